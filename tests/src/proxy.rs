//! A TCP proxy that a test can block.

use std::{
    io::{Read as _, Write as _},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU16, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use crate::Namespace;

/// The interval at which the threads check whether to stop.
const POLL: Duration = Duration::from_millis(20);

/// Forwards connections from a port of its own on 127.0.0.1 to another port.
#[derive(Debug)]
pub struct TcpProxy {
    port: u16,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    to: AtomicU16,
    stop: AtomicBool,
    /// True if new connections are closed at once.
    refuse: AtomicBool,
    connections: Mutex<Vec<Arc<Connection>>>,
}

#[derive(Debug)]
struct Connection {
    ends: [TcpStream; 2],
    /// True if bytes are read from neither side any more; both connections stay open.
    stalled: AtomicBool,
}

impl TcpProxy {
    /// Forwards to a port on 127.0.0.1.
    pub fn start(to: u16) -> Self {
        Self::forward(TcpListener::bind("127.0.0.1:0").expect("a free port"), to)
    }

    /// Forwards from 127.0.0.1 of another network namespace to a port on 127.0.0.1 of the test's own.
    pub fn start_in(from: &Namespace, to: u16) -> Self {
        let listener = from.run(|| TcpListener::bind("127.0.0.1:0"));
        Self::forward(listener.expect("a free port"), to)
    }

    fn forward(listener: TcpListener, to: u16) -> Self {
        let port = listener.local_addr().expect("its address").port();
        listener
            .set_nonblocking(true)
            .expect("a non-blocking listener");
        let shared = Arc::new(Shared::default());
        shared.to.store(to, Relaxed);
        let accepting = Arc::clone(&shared);
        let thread = thread::spawn(move || {
            while !accepting.stop.load(Relaxed) {
                match listener.accept() {
                    Ok((near, _)) => accept(&accepting, near),
                    Err(_) => thread::sleep(POLL),
                }
            }
        });
        Self {
            port,
            shared,
            thread: Some(thread),
        }
    }

    /// The port of the proxy.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Stalls the current connections: they stay open, but nothing passes. Later connections are forwarded.
    pub fn stall(&self) {
        for connection in self.shared.connections().iter() {
            connection.stalled.store(true, Relaxed);
        }
    }

    /// Closes the current connections, and every new one until [`Self::allow`].
    pub fn refuse(&self) {
        self.shared.refuse.store(true, Relaxed);
        for connection in self.shared.connections().drain(..) {
            connection.close();
        }
    }

    /// Forwards new connections again.
    pub fn allow(&self) {
        self.shared.refuse.store(false, Relaxed);
    }

    /// The number of connections, open or ended, since the last [`Self::refuse`].
    pub fn connections(&self) -> usize {
        self.shared.connections().len()
    }
}

impl Shared {
    fn connections(&self) -> std::sync::MutexGuard<'_, Vec<Arc<Connection>>> {
        self.connections
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Connection {
    fn close(&self) {
        for end in &self.ends {
            let _ = end.shutdown(Shutdown::Both);
        }
    }
}

fn accept(shared: &Arc<Shared>, near: TcpStream) {
    if shared.refuse.load(Relaxed) {
        return;
    }
    let Ok(far) = TcpStream::connect(("127.0.0.1", shared.to.load(Relaxed))) else {
        return;
    };
    near.set_nonblocking(false).expect("a blocking stream");
    let connection = Arc::new(Connection {
        ends: [near, far],
        stalled: AtomicBool::new(false),
    });
    shared.connections().push(Arc::clone(&connection));
    if shared.refuse.load(Relaxed) {
        // The connection was accepted while `refuse` closed the others.
        connection.close();
    }
    for (from, to) in [(0, 1), (1, 0)] {
        let connection = Arc::clone(&connection);
        thread::spawn(move || forward(&connection, from, to));
    }
}

fn forward(connection: &Connection, from: usize, to: usize) {
    let mut buffer = [0; 16 * 1024];
    while let Ok(length @ 1..) = (&connection.ends[from]).read(&mut buffer) {
        if connection.stalled.load(Relaxed) {
            // The bytes read so far are discarded, and no more are read.
            return;
        }
        if (&connection.ends[to]).write_all(&buffer[..length]).is_err() {
            break;
        }
    }
    if !connection.stalled.load(Relaxed) {
        connection.close();
    }
}

impl Drop for TcpProxy {
    fn drop(&mut self) {
        self.shared.stop.store(true, Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        self.refuse();
    }
}
