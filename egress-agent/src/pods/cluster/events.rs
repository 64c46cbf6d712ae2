//! Reports on pods with Events.
//!
//! kube's own recorder is not used: it treats two Events with the same reason as the same Event and repeats
//! the first one's note, so only one of several denied destinations would be visible.

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
    token_bucket::TokenBucket,
};

/// Length of the queue of Events.
const QUEUE: usize = 256;
/// How many of them may be about one pod.
const QUEUE_PER_POD: usize = 16;
/// Longest note in bytes, the API server's limit.
const NOTE_MAX: usize = 1024;
/// Longest name of a reporting instance in bytes, the API server's limit.
const INSTANCE_MAX: usize = 128;
/// How many bytes of a pod's name go into the names of its Events, which may have 253 bytes.
const NAME_MAX: usize = 220;
/// Token bucket of one pod's Events: burst, and time for one more.
const OF_POD: (u32, Duration) = (10, Duration::from_secs(30));
/// Token bucket of all pods' Events.
const OF_ALL: (u32, Duration) = (100, Duration::from_millis(200));
/// Shortest interval between two updates of a repeated Event.
const REPEAT_EVERY: Duration = Duration::from_secs(10);
/// Deduplication window: an equal Event within it counts as a repetition.
const REPEATED_FOR: Duration = Duration::from_secs(6 * 60);
/// Most Events that are remembered for deduplication.
const REMEMBERED: usize = 4096;
/// The reporting controller.
const CONTROLLER: &str = "egress-agent.dev/agent";
/// The action of every Event.
const ACTION: &str = "Enforce";

/// An Event about a pod.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PodEvent {
    /// The pod's namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its UID.
    pub uid: String,
    /// The reason in one word, such as `PolicyUnreadable`.
    pub reason: &'static str,
    /// The explanation for people, cut after 1024 bytes.
    pub note: String,
    /// Whether somebody has to act.
    pub warning: bool,
}

/// Counters of Events.
#[derive(Debug, Default)]
pub struct EventCounters {
    sent: AtomicU64,
    dropped: AtomicU64,
    failed: AtomicU64,
}

impl EventCounters {
    /// Events that were written, including repetitions.
    pub fn sent(&self) -> u64 {
        self.sent.load(Relaxed)
    }

    /// Events that were dropped because there were too many.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Relaxed)
    }

    /// Events that the API server did not accept.
    pub fn failed(&self) -> u64 {
        self.failed.load(Relaxed)
    }
}

/// Accepts Events without blocking.
#[derive(Clone, Debug)]
pub struct EventSink {
    queue: mpsc::Sender<PodEvent>,
    queued: Arc<QueuedEvents>,
    counters: Arc<EventCounters>,
}

/// How many Events of each pod are queued, by UID. The lock is held only for one table operation.
#[derive(Debug, Default)]
struct QueuedEvents(Mutex<HashMap<String, usize>>);

impl QueuedEvents {
    /// Counts one more queued Event, unless the pod has reached its limit.
    fn add(&self, uid: &str) -> bool {
        let mut pods = self.lock();
        let queued = pods.entry(uid.to_owned()).or_default();
        let is_room = *queued < QUEUE_PER_POD;
        *queued += usize::from(is_room);
        is_room
    }

    /// Counts one queued Event less.
    fn take(&self, uid: &str) {
        let mut pods = self.lock();
        if let Some(queued) = pods.get_mut(uid) {
            *queued -= 1;
            if *queued == 0 {
                pods.remove(uid);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl EventSink {
    /// Queues an Event. If the queue or the pod's share of it is full, the Event is dropped and counted.
    pub fn send(&self, event: PodEvent) {
        let uid = event.uid.clone();
        if !self.queued.add(&uid) {
            self.counters.dropped.fetch_add(1, Relaxed);
        } else if self.queue.try_send(event).is_err() {
            self.queued.take(&uid);
            self.counters.dropped.fetch_add(1, Relaxed);
        }
    }

    /// The counters of Events.
    pub fn counters(&self) -> &EventCounters {
        &self.counters
    }
}

/// Creates a sink, and the writer of the Events that it accepts.
pub(super) fn channel(connection: Arc<Connection>, node: &str) -> (EventSink, Writer) {
    let (sender, queue) = mpsc::channel(QUEUE);
    let counters = Arc::<EventCounters>::default();
    let queued = Arc::<QueuedEvents>::default();
    let now = Instant::now();
    let writer = Writer {
        connection,
        queue,
        queued: Arc::clone(&queued),
        counters: Arc::clone(&counters),
        instance: cut(node, INSTANCE_MAX).to_owned(),
        recent: HashMap::new(),
        of_pod: HashMap::new(),
        of_all: TokenBucket::new(OF_ALL.0, OF_ALL.1, now),
        is_failing: false,
    };
    let sink = EventSink {
        queue: sender,
        queued,
        counters,
    };
    (sink, writer)
}

/// Writes Events.
#[derive(Debug)]
pub(super) struct Writer {
    connection: Arc<Connection>,
    queue: mpsc::Receiver<PodEvent>,
    queued: Arc<QueuedEvents>,
    counters: Arc<EventCounters>,
    /// The node's name.
    instance: String,
    recent: HashMap<PodEvent, WrittenEvent>,
    /// By UID.
    of_pod: HashMap<String, TokenBucket>,
    of_all: TokenBucket,
    is_failing: bool,
}

/// An Event that exists already.
#[derive(Debug)]
struct WrittenEvent {
    name: String,
    count: i32,
    last: Instant,
    /// The count that was last written.
    written: i32,
}

impl Writer {
    /// Writes Events until the queue is closed.
    pub(super) async fn run(mut self) {
        let mut repeat = tokio::time::interval(REPEAT_EVERY);
        loop {
            tokio::select! {
                event = self.queue.recv() => match event {
                    Some(event) => {
                        self.queued.take(&event.uid);
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
        if let Some(entry) = self.recent.get_mut(&event) {
            entry.count = entry.count.saturating_add(1);
            entry.last = now;
            return;
        }
        let of_pod = self.of_pod.entry(event.uid.clone());
        let of_pod = of_pod.or_insert_with(|| TokenBucket::new(OF_POD.0, OF_POD.1, now));
        let is_full = self.recent.len() >= REMEMBERED;
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
            let written = WrittenEvent {
                name,
                count: 1,
                last: now,
                written: 1,
            };
            self.recent.insert(event, written);
        }
    }

    /// Updates the counts of repeated Events, and forgets those whose deduplication window has ended.
    async fn repeat(&mut self) {
        let now = Instant::now();
        let mut recent = std::mem::take(&mut self.recent);
        let mut gone = Vec::new();
        for (event, entry) in &mut recent {
            if entry.count == entry.written || !self.of_all.take(now) {
                continue;
            }
            let series = EventSeries {
                count: entry.count,
                last_observed_time: MicroTime(Timestamp::now()),
            };
            let patch = Patch::Merge(serde_json::json!({ "series": series }));
            let api = self.api(&event.namespace);
            let patched = api
                .patch(&entry.name, &PatchParams::default(), &patch)
                .await
                .map(drop);
            entry.written = entry.count;
            let is_gone = matches!(&patched, Err(kube::Error::Api(status)) if status.code == 404);
            if is_gone {
                // It has expired: the API server keeps Events for about an hour.
                gone.push(event.clone());
            } else {
                self.note(patched).await;
            }
        }
        recent.retain(|event, entry| {
            now.saturating_duration_since(entry.last) < REPEATED_FOR && !gone.contains(event)
        });
        self.recent = recent;
        self.of_pod.retain(|_, bucket| !bucket.is_full(now));
    }

    /// Counts the result of a write; returns true on success.
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
        // Logged once, until a write succeeds again.
        if !std::mem::replace(&mut self.is_failing, true) {
            tracing::warn!("cannot write Events; they are lost until a write succeeds: {message}");
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

/// The longest beginning of a text that has at most `max` bytes.
pub(super) fn cut(text: &str, max: usize) -> &str {
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
    fn one_pods_events_leave_room_for_those_of_another() {
        let (queue, mut events) = mpsc::channel(QUEUE);
        let sink = EventSink {
            queue,
            queued: Arc::default(),
            counters: Arc::default(),
        };
        for number in 0..QUEUE {
            sink.send(event("loud", number));
        }
        sink.send(event("other", 0));
        let mut taken = Vec::new();
        while let Ok(event) = events.try_recv() {
            sink.queued.take(&event.uid);
            taken.push(event.uid);
        }
        assert_eq!(taken.len(), QUEUE_PER_POD + 1);
        assert_eq!(taken.last().map(String::as_str), Some("other"));
        assert_eq!(sink.counters.dropped() as usize, QUEUE - QUEUE_PER_POD);
        // A written Event makes room for another one.
        sink.send(event("loud", 0));
        assert!(events.try_recv().is_ok());
        assert_eq!(sink.queued.lock().len(), 1);
    }

    #[test]
    fn a_text_is_cut_between_characters() {
        assert_eq!(cut("abc", 5), "abc");
        assert_eq!(cut("aöü", 2), "a");
        assert_eq!(cut("aöü", 3), "aö");
    }
}
