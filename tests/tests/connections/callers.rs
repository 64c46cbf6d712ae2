//! Callers outside, and their connections to a server in the pod.

use std::{
    io::{self, Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    time::Duration,
};

use egress_tests::{DEADLINE, Lab, Pod};
use socket2::{Domain, Socket, Type};

/// The port that the pod serves.
pub(crate) const PORT: u16 = 8080;

/// Opens a connection to the pod's [`PORT`] from this outside address.
#[track_caller]
pub(crate) fn call(lab: &Lab, from: IpAddr, pod: &Pod) -> io::Result<TcpStream> {
    let to = SocketAddr::from((pod.ipv4(), PORT));
    lab.outside().run(|| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        socket.bind(&SocketAddr::from((from, 0)).into())?;
        socket.connect_timeout(&to.into(), DEADLINE)?;
        Ok(socket.into())
    })
}

/// A connection from outside to a server in the pod.
pub(crate) struct Inbound {
    pub(crate) caller: TcpStream,
    pub(crate) server: TcpStream,
}

impl Inbound {
    /// Opens a connection to a port on which the pod listens only for it.
    #[track_caller]
    pub(crate) fn open(lab: &Lab, pod: &Pod, port: u16) -> Self {
        let listener = pod.listen_tcp(port);
        let to = SocketAddr::from((pod.ipv4(), port));
        let caller = lab.outside().run(|| TcpStream::connect(to));
        let (server, _) = listener.accept().expect("the pod's server accepts");
        Self {
            caller: caller.expect("the pod is called"),
            server,
        }
    }

    /// Opens a connection from this outside address to the pod's listener on [`PORT`].
    #[track_caller]
    pub(crate) fn open_from(lab: &Lab, from: IpAddr, pod: &Pod, listener: &TcpListener) -> Self {
        let caller = call(lab, from, pod).expect("the pod accepts the connection");
        let (server, _) = listener.accept().expect("a connection");
        Self { caller, server }
    }

    /// True if data from the pod reaches the caller.
    pub(crate) fn is_answered(&mut self, timeout: Duration) -> bool {
        self.server.write_all(b"hello").expect("the pod writes");
        let timeout = Some(timeout);
        self.caller.set_read_timeout(timeout).expect("a time-out");
        let mut heard = [0; 5];
        self.caller.read_exact(&mut heard).is_ok() && heard == *b"hello"
    }

    /// True if data arrives in both directions.
    pub(crate) fn goes_on(&mut self) -> bool {
        fn takes(from: &mut TcpStream, into: &mut TcpStream) -> bool {
            let mut taken = [0; 4];
            from.set_read_timeout(Some(DEADLINE)).is_ok()
                && into.write_all(b"word").is_ok()
                && from.read_exact(&mut taken).is_ok()
        }
        takes(&mut self.server, &mut self.caller) && takes(&mut self.caller, &mut self.server)
    }
}
