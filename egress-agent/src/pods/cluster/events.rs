//! Tells people about pods, by Events.
//!
//! kube's own recorder is not used: it takes two Events of the same reason for the same, and says
//! the first one's note again, so that of several denied destinations one would be seen.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use k8s_openapi::{
    api::{
        core::v1::ObjectReference,
        events::v1::{Event, EventSeries},
    },
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
    jiff::Timestamp,
};
use kube::{
    Api,
    api::{Patch, PatchParams, PostParams},
};
use tokio::sync::mpsc;

use super::{
    connection::{Connection, root},
    rate::Rate,
};

/// Events that wait to be written.
const QUEUE: usize = 256;
/// Of which one pod's may be this many.
const QUEUE_PER_POD: usize = 16;
/// Longest note in bytes, as the API server checks it.
const NOTE_MAX: usize = 1024;
/// Longest name of a reporting instance in bytes, likewise.
const INSTANCE_MAX: usize = 128;
/// Of a pod's name so much is in the name of its Events, which may have 253 bytes.
const NAME_MAX: usize = 220;
/// Events of one pod: so many at once, and then one in so long a time.
const OF_POD: (u32, Duration) = (10, Duration::from_secs(30));
/// Events of all pods together, likewise.
const OF_ALL: (u32, Duration) = (100, Duration::from_millis(200));
/// A repeated Event is told again at most this often.
const REPEAT_EVERY: Duration = Duration::from_secs(10);
/// How long the same is a repetition, and then something new.
const REPEATED_FOR: Duration = Duration::from_secs(6 * 60);
/// Most Events that are remembered for it.
const REMEMBERED: usize = 4096;
/// Who reports.
const CONTROLLER: &str = "egress-agent.dev/agent";
/// What was done, for every Event.
const ACTION: &str = "Enforce";

/// Something to say about a pod.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PodEvent {
    /// The pod's namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its UID.
    pub uid: String,
    /// Why, in one word such as `PolicyUnreadable`.
    pub reason: &'static str,
    /// The whole story, for a person; what is beyond 1024 bytes is cut.
    pub note: String,
    /// Whether someone has to look at it.
    pub warning: bool,
}

/// How many Events were told.
#[derive(Debug, Default)]
pub struct EventCounters {
    sent: AtomicU64,
    dropped: AtomicU64,
    failed: AtomicU64,
}

impl EventCounters {
    /// Written, repetitions included.
    pub fn sent(&self) -> u64 {
        self.sent.load(Relaxed)
    }

    /// Not written because there were too many.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Relaxed)
    }

    /// Not written because the API server did not take them.
    pub fn failed(&self) -> u64 {
        self.failed.load(Relaxed)
    }
}

/// Takes Events and never waits.
#[derive(Clone, Debug)]
pub struct EventSink {
    queue: mpsc::Sender<PodEvent>,
    waiting: Arc<QueuedEvents>,
    counters: Arc<EventCounters>,
}

/// How many Events of each pod are in the queue, by UID. The lock is held for a look at the table.
#[derive(Debug, Default)]
struct QueuedEvents(Mutex<HashMap<String, usize>>);

impl QueuedEvents {
    /// One more, unless the pod has as many as it may.
    fn add(&self, uid: &str) -> bool {
        let mut pods = self.lock();
        let waiting = pods.entry(uid.to_owned()).or_default();
        let is_room = *waiting < QUEUE_PER_POD;
        *waiting += usize::from(is_room);
        is_room
    }

    /// One less.
    fn take(&self, uid: &str) {
        let mut pods = self.lock();
        if let Some(waiting) = pods.get_mut(uid) {
            *waiting -= 1;
            if *waiting == 0 {
                pods.remove(uid);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl EventSink {
    /// Has an Event written, soon. Too many are dropped, and counted.
    pub fn send(&self, event: PodEvent) {
        let uid = event.uid.clone();
        if !self.waiting.add(&uid) {
            self.counters.dropped.fetch_add(1, Relaxed);
        } else if self.queue.try_send(event).is_err() {
            self.waiting.take(&uid);
            self.counters.dropped.fetch_add(1, Relaxed);
        }
    }

    /// How many Events were told.
    pub fn counters(&self) -> &EventCounters {
        &self.counters
    }
}

/// A sink, and what writes the Events it takes.
pub(super) fn channel(connection: Arc<Connection>, node: &str) -> (EventSink, Writer) {
    let (sender, queue) = mpsc::channel(QUEUE);
    let counters = Arc::<EventCounters>::default();
    let waiting = Arc::<QueuedEvents>::default();
    let now = Instant::now();
    let writer = Writer {
        connection,
        queue,
        waiting: Arc::clone(&waiting),
        counters: Arc::clone(&counters),
        instance: cut(node, INSTANCE_MAX).to_owned(),
        told: HashMap::new(),
        of_pod: HashMap::new(),
        of_all: Rate::new(OF_ALL.0, OF_ALL.1, now),
        is_failing: false,
    };
    let sink = EventSink {
        queue: sender,
        waiting,
        counters,
    };
    (sink, writer)
}

/// Writes Events.
#[derive(Debug)]
pub(super) struct Writer {
    connection: Arc<Connection>,
    queue: mpsc::Receiver<PodEvent>,
    waiting: Arc<QueuedEvents>,
    counters: Arc<EventCounters>,
    /// The node's name.
    instance: String,
    told: HashMap<PodEvent, Told>,
    /// By UID.
    of_pod: HashMap<String, Rate>,
    of_all: Rate,
    is_failing: bool,
}

/// An Event that is there already.
#[derive(Debug)]
struct Told {
    name: String,
    count: i32,
    last: Instant,
    /// The count that was last written.
    written: i32,
}

impl Writer {
    /// Writes until the task is ended.
    pub(super) async fn run(mut self) {
        let mut repeat = tokio::time::interval(REPEAT_EVERY);
        loop {
            tokio::select! {
                event = self.queue.recv() => match event {
                    Some(event) => {
                        self.waiting.take(&event.uid);
                        self.take(event).await;
                    }
                    None => return,
                },
                _ = repeat.tick() => self.repeat().await,
            }
        }
    }

    async fn take(&mut self, mut event: PodEvent) {
        let kept = cut(&event.note, NOTE_MAX).len();
        event.note.truncate(kept);
        let now = Instant::now();
        if let Some(told) = self.told.get_mut(&event) {
            told.count = told.count.saturating_add(1);
            told.last = now;
            return;
        }
        let of_pod = self.of_pod.entry(event.uid.clone());
        let of_pod = of_pod.or_insert_with(|| Rate::new(OF_POD.0, OF_POD.1, now));
        let is_full = self.told.len() >= REMEMBERED;
        if is_full || !of_pod.take(now) || !self.of_all.take(now) {
            self.counters.dropped.fetch_add(1, Relaxed);
            return;
        }
        let name = format!(
            "{}.{:x}",
            cut(&event.name, NAME_MAX).trim_end_matches(['.', '-']),
            Timestamp::now().as_nanosecond()
        );
        let object = self.object(&event, &name);
        let api = self.api(&event.namespace);
        let created = api.create(&PostParams::default(), &object).await;
        if self.note(created.map(drop)).await {
            let told = Told {
                name,
                count: 1,
                last: now,
                written: 1,
            };
            self.told.insert(event, told);
        }
    }

    /// Tells how often the same has happened since, and forgets what has not happened for long.
    async fn repeat(&mut self) {
        let now = Instant::now();
        let mut told = std::mem::take(&mut self.told);
        let mut gone = Vec::new();
        for (event, told) in &mut told {
            if told.count == told.written || !self.of_all.take(now) {
                continue;
            }
            let series = EventSeries {
                count: told.count,
                last_observed_time: MicroTime(Timestamp::now()),
            };
            let patch = Patch::Merge(serde_json::json!({ "series": series }));
            let api = self.api(&event.namespace);
            let patched = api
                .patch(&told.name, &PatchParams::default(), &patch)
                .await
                .map(drop);
            told.written = told.count;
            let is_gone = matches!(&patched, Err(kube::Error::Api(status)) if status.code == 404);
            if is_gone {
                // The API server keeps Events for an hour or so.
                gone.push(event.clone());
            } else {
                self.note(patched).await;
            }
        }
        told.retain(|event, told| {
            now.saturating_duration_since(told.last) < REPEATED_FOR && !gone.contains(event)
        });
        self.told = told;
        self.of_pod.retain(|_, rate| !rate.is_whole(now));
    }

    /// Counts how a write went; true when it went well.
    async fn note(&mut self, written: Result<(), kube::Error>) -> bool {
        let Err(error) = written else {
            self.counters.sent.fetch_add(1, Relaxed);
            self.is_failing = false;
            return true;
        };
        self.counters.failed.fetch_add(1, Relaxed);
        let message = match &error {
            kube::Error::Api(status) => status.message.clone(),
            other => root(other),
        };
        // Said once, until it goes well again.
        if !std::mem::replace(&mut self.is_failing, true) {
            tracing::warn!("Events cannot be written, and those of now are lost: {message}");
        }
        if matches!(&error, kube::Error::Api(status) if status.code == 401) {
            let (generation, _) = self.connection.client();
            self.connection.renew(generation).await;
        }
        false
    }

    fn api(&self, namespace: &str) -> Api<Event> {
        Api::namespaced(self.connection.client().1, namespace)
    }

    fn object(&self, event: &PodEvent, name: &str) -> Event {
        let kind = if event.warning { "Warning" } else { "Normal" };
        Event {
            metadata: ObjectMeta {
                namespace: Some(event.namespace.clone()),
                name: Some(name.to_owned()),
                ..ObjectMeta::default()
            },
            event_time: Some(MicroTime(Timestamp::now())),
            reporting_controller: Some(CONTROLLER.into()),
            reporting_instance: Some(self.instance.clone()),
            action: Some(ACTION.into()),
            reason: Some(event.reason.into()),
            type_: Some(kind.into()),
            note: Some(event.note.clone()),
            regarding: Some(ObjectReference {
                api_version: Some("v1".into()),
                kind: Some("Pod".into()),
                namespace: Some(event.namespace.clone()),
                name: Some(event.name.clone()),
                uid: Some(event.uid.clone()),
                ..ObjectReference::default()
            }),
            ..Event::default()
        }
    }
}

/// The beginning of a text that has at most so many bytes.
fn cut(text: &str, max: usize) -> &str {
    let end = (0..=max.min(text.len())).rfind(|at| text.is_char_boundary(*at));
    &text[..end.unwrap_or(0)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(uid: &str, number: usize) -> PodEvent {
        PodEvent {
            namespace: "n".into(),
            name: "p".into(),
            uid: uid.into(),
            reason: "Denied",
            note: number.to_string(),
            warning: true,
        }
    }

    #[test]
    fn one_pods_events_leave_room_for_another_pods() {
        let (queue, mut events) = mpsc::channel(QUEUE);
        let sink = EventSink {
            queue,
            waiting: Arc::default(),
            counters: Arc::default(),
        };
        for number in 0..QUEUE {
            sink.send(event("loud", number));
        }
        sink.send(event("other", 0));
        let mut taken = Vec::new();
        while let Ok(event) = events.try_recv() {
            sink.waiting.take(&event.uid);
            taken.push(event.uid);
        }
        assert_eq!(taken.len(), QUEUE_PER_POD + 1);
        assert_eq!(taken.last().map(String::as_str), Some("other"));
        assert_eq!(sink.counters.dropped() as usize, QUEUE - QUEUE_PER_POD);
        // What was written makes room.
        sink.send(event("loud", 0));
        assert!(events.try_recv().is_ok());
        assert_eq!(sink.waiting.lock().len(), 1);
    }

    #[test]
    fn a_text_is_cut_between_characters() {
        assert_eq!(cut("abc", 5), "abc");
        assert_eq!(cut("aöü", 2), "a");
        assert_eq!(cut("aöü", 3), "aö");
    }
}
