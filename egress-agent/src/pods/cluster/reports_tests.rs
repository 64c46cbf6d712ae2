use std::{
    convert::Infallible,
    sync::{Mutex, PoisonError},
};

use http::{Method, Request, Response};
use kube::client::Body;
use serde_json::{Value, json};
use tokio::{task::JoinHandle, time::sleep};

use super::{super::super::PodCounts, *};

/// How often the content changes in the tests.
const OFTEN: Duration = Duration::from_millis(100);

/// An API server with room for one object.
#[derive(Debug, Default)]
struct Server {
    object: Mutex<Option<Value>>,
    /// When an object was stored, and how many pods it reports.
    writes: Mutex<Vec<(Instant, u64)>>,
}

impl Server {
    async fn respond(
        self: Arc<Self>,
        request: Request<Body>,
    ) -> Result<Response<Body>, Infallible> {
        let method = request.method().clone();
        let body = request.into_body().collect_bytes().await.unwrap();
        let sent: Value = serde_json::from_slice(&body).unwrap();
        let mut object = self.object.lock().unwrap_or_else(PoisonError::into_inner);
        let (code, answer) = match (method, object.as_mut()) {
            (Method::PATCH, None) => {
                let status = json!({
                    "kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound",
                    "message": "not found", "code": 404,
                });
                (404, status)
            }
            (Method::PATCH, Some(object)) => {
                object["status"] = sent["status"].clone();
                (200, object.clone())
            }
            (Method::POST, None) => {
                *object = Some(sent.clone());
                (201, sent)
            }
            (method, object) => panic!("{method} {object:?}"),
        };
        if code < 300 {
            let pods = answer["status"]["pods"]["selected"].as_u64().unwrap();
            let mut writes = self.writes.lock().unwrap_or_else(PoisonError::into_inner);
            writes.push((Instant::now(), pods));
        }
        let response = Response::builder().status(code);
        Ok(response
            .body(Body::from(answer.to_string().into_bytes()))
            .unwrap())
    }

    fn writes(&self) -> Vec<(Instant, u64)> {
        let writes = self.writes.lock().unwrap_or_else(PoisonError::into_inner);
        writes.clone()
    }

    /// What was reported, one after the other.
    fn written(&self) -> Vec<u64> {
        self.writes().into_iter().map(|(_, pods)| pods).collect()
    }
}

/// A sink whose writer runs against a server. The clock must be paused.
fn start() -> (Arc<Server>, ReportSink, JoinHandle<()>) {
    let server = Arc::<Server>::default();
    let responding = Arc::clone(&server);
    let service = tower::service_fn(move |request| Arc::clone(&responding).respond(request));
    let client = kube::Client::new(service, "default");
    let (sink, writer) = channel(Arc::new(Connection::with(client)), "n1");
    (server, sink, tokio::spawn(writer.run()))
}

/// A report about this number of pods.
fn report(pods: u32) -> NodeReport {
    let pods = PodCounts {
        selected: pods,
        ..PodCounts::default()
    };
    NodeReport::new(None, pods, &[], [].into_iter())
}

/// Publishes another report all the time, and returns when each write was made.
async fn write_changes(nodes: usize, during: Duration) -> Vec<Instant> {
    let (server, sink, task) = start();
    sink.note_nodes(nodes);
    let mut number = 0;
    let end = Instant::now() + during;
    while Instant::now() < end {
        number += 1;
        sink.publish(report(number));
        sleep(OFTEN).await;
    }
    drop(sink);
    task.await.unwrap();
    let writes = server.writes();
    // Each write has the content of its time.
    assert!(
        writes.is_sorted_by(|one, next| one.1 < next.1),
        "{writes:?}"
    );
    writes.into_iter().map(|(at, _)| at).collect()
}

fn pauses(writes: &[Instant]) -> impl Iterator<Item = Duration> {
    writes.windows(2).map(|pair| pair[1] - pair[0])
}

#[test]
fn all_nodes_together_write_at_a_bounded_rate() {
    assert_eq!(interval(0), EVERY);
    assert_eq!(interval(500), EVERY);
    assert_eq!(interval(5000), Duration::from_secs(50));
    assert_eq!(interval(u32::MAX), PAUSE_MAX);
}

#[tokio::test(start_paused = true)]
async fn a_report_that_changes_all_the_time_is_written_once_in_each_interval() {
    for (nodes, every) in [(3, EVERY), (5000, Duration::from_secs(50))] {
        let during = every * 20;
        let writes = write_changes(nodes, during).await;
        assert!(pauses(&writes).all(|pause| pause >= every), "{writes:?}");
        // Nor does it wait for changes to end.
        assert!(
            pauses(&writes).all(|pause| pause <= every * 2),
            "{writes:?}"
        );
        assert!(writes.len() >= 10, "{writes:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_report_that_does_not_change_is_not_written_again() {
    let (server, sink, _writer) = start();
    let end = Instant::now() + RESYNC.start;
    while Instant::now() < end {
        sink.publish(report(7));
        sleep(OFTEN * 10).await;
    }
    assert_eq!(server.written(), [7]);
    assert_eq!(sink.counters().written(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_change_that_is_taken_back_within_the_interval_is_not_written() {
    let (server, sink, _writer) = start();
    sink.publish(report(7));
    sleep(EVERY * 2).await;
    sink.publish(report(8));
    sleep(OFTEN).await;
    sink.publish(report(7));
    sleep(EVERY * 10).await;
    assert_eq!(server.written(), [7]);
    sink.publish(report(9));
    sleep(EVERY * 2).await;
    assert_eq!(server.written(), [7, 9]);
}

#[tokio::test(start_paused = true)]
async fn the_same_report_is_written_again_after_half_an_hour_to_an_hour() {
    let (server, sink, _writer) = start();
    sink.publish(report(7));
    sleep(RESYNC.start).await;
    assert_eq!(server.written(), [7]);
    // Somebody deletes it.
    server
        .object
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .take();
    sleep(RESYNC.end.saturating_sub(RESYNC.start) + EVERY * 2).await;
    assert_eq!(server.written(), [7, 7]);
}
