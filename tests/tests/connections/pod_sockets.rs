//! The agent finds the flows of a pod that is older than the agent by the pod's sockets.

use std::{
    io,
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
};

use egress_agent::host::{
    Direction::{self, Inbound, Outbound, Unconfirmed},
    Host, HostOptions, OpenSocket, OpenSockets, SocketProtocol,
};
use egress_tests::{Lab, Namespace, Node, NodePod, eventually, holds, node::Qos};
use socket2::{Domain, Socket, Type};

const UID: &str = "e9e55e01-0001-4000-8000";

/// A pod that nobody enforces, and its node.
struct Scene {
    pod: NodePod,
    host: Host,
    lab: Lab,
}

impl Scene {
    #[track_caller]
    fn new(number: u32) -> Self {
        let lab = Lab::builder().without_dns().tracking().build();
        let uid = format!("{UID}-{number:04x}{:08x}", std::process::id());
        let pod = Node::default().run_pod(&lab, "cart", &uid, Qos::Burstable);
        let host = lab.node().run(|| Host::open(HostOptions::default()));
        let host = host.expect("the machine can be looked at");
        Self { pod, host, lab }
    }

    fn inside(&self) -> &Namespace {
        self.pod.pod().netns()
    }

    /// The pod's and the node's addresses in one family.
    fn addresses(&self, v6: bool) -> (IpAddr, IpAddr) {
        let pod = self.pod.pod();
        let (v4, v6) = if v6 {
            (None, Some(pod.ipv6()))
        } else {
            (Some(pod.ipv4()), None)
        };
        match (v4, v6) {
            (Some(own), _) => {
                let [a, b, c, _] = own.octets();
                (own.into(), [a, b, c, 1].into())
            }
            (_, own) => {
                let own = own.expect("one of two");
                let mut far = own.segments();
                far[7] = 1;
                (own.into(), far.into())
            }
        }
    }

    #[track_caller]
    fn open(&mut self) -> OpenSockets {
        let links = self.host.links().expect("the kernel lists interfaces");
        let located = self
            .host
            .locate(&links, self.pod.uid())
            .expect("the pod is located");
        let namespace = self.host.sockets(&located.namespaces[0]);
        let namespace = namespace.expect("the pod's network can be opened");
        let open = self.lab.node().run(|| namespace.read());
        open.expect("the tables of sockets can be read")
    }

    /// Waits until the agent finds exactly these sockets.
    #[track_caller]
    fn expect(&mut self, mut expected: Vec<OpenSocket>) {
        expected.sort();
        let mut last = Vec::new();
        let what = format!("the pod's open sockets are {expected:#?}");
        eventually(&what, || {
            let OpenSockets {
                mut sockets,
                cut_short,
                unclear,
                conntrack_error,
            } = self.open();
            assert!(!cut_short);
            assert_eq!(conntrack_error, None);
            assert_eq!(unclear, 0);
            sockets.sort();
            last = sockets;
            holds(last == expected)
        });
    }

    #[track_caller]
    fn listen(&self, at: IpAddr) -> TcpListener {
        let listener = self.lab.node().run(|| TcpListener::bind((at, 0)));
        listener.expect("listen on the node")
    }

    /// Opens a connection from the pod; returns the pod's end and the node's end.
    #[track_caller]
    fn connect(&self, listener: &TcpListener) -> (TcpStream, TcpStream) {
        let to = listener.local_addr().expect("its address");
        let near = self.pod.pod().reach_tcp(to);
        let (far, _) = listener.accept().expect("the pod's connection");
        (near, far)
    }

    /// Stops all frames from the pod to the node: they go to an unknown hardware address.
    #[track_caller]
    fn drop_frames_from_the_pod(&self) {
        let (_, far) = self.addresses(false);
        self.inside().ip_batch(&format!(
            "neigh replace {far} lladdr 02:00:00:00:00:99 dev eth0\n"
        ));
    }
}

fn tcp(near: &TcpStream, direction: Direction) -> OpenSocket {
    OpenSocket {
        protocol: SocketProtocol::Tcp,
        local: canonical(near.local_addr()),
        remote: canonical(near.peer_addr()),
        direction,
    }
}

/// The pod's end of a connection, from the node's end.
fn other_end(far: &TcpStream, direction: Direction) -> OpenSocket {
    let mut socket = tcp(far, direction);
    std::mem::swap(&mut socket.local, &mut socket.remote);
    socket
}

fn canonical(address: io::Result<SocketAddr>) -> SocketAddr {
    let address = address.expect("an address");
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Starts to connect and does not wait.
#[track_caller]
fn start_connecting(within: &Namespace, to: SocketAddr) -> Socket {
    within.run(|| {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, None).expect("a socket");
        socket.set_nonblocking(true).expect("it need not block");
        let begun = socket
            .connect(&to.into())
            .expect_err("it cannot be connected at once");
        assert_eq!(
            begun.raw_os_error(),
            Some(nix::libc::EINPROGRESS),
            "{begun}"
        );
        socket
    })
}

#[test]
fn connections_of_both_families_and_directions_are_found() {
    let mut scene = Scene::new(1);
    let server = scene.pod.pod().listen_tcp(8080);
    let mut kept = Vec::new();
    let mut expected = Vec::new();
    for v6 in [false, true] {
        let (own, far) = scene.addresses(v6);
        let listener = scene.listen(far);
        let out = scene.connect(&listener);
        expected.push(tcp(&out.0, Outbound));

        let from = scene.lab.node().run(|| TcpStream::connect((own, 8080)));
        let from = from.expect("connect to the pod");
        let (inside, _) = server.accept().expect("the node's connection");
        expected.push(tcp(&inside, Inbound));
        assert_eq!(expected.last(), Some(&other_end(&from, Inbound)));
        kept.push((listener, out, from, inside));
    }
    // A connection within the pod does not count.
    let own = scene
        .inside()
        .run(|| TcpStream::connect(("127.0.0.1", 8080)));
    let own = own.expect("connect within the pod");
    scene.expect(expected);
    drop((own, kept, server));
}

#[test]
fn connections_count_as_long_as_either_side_may_send() {
    let mut scene = Scene::new(2);
    let (own, far) = scene.addresses(false);
    let listener = scene.listen(far);
    let server = scene.pod.pod().listen_tcp(8080);

    // FIN-WAIT-2: only the node may still send.
    let half = scene.connect(&listener);
    half.0.shutdown(std::net::Shutdown::Write).unwrap();
    // CLOSE-WAIT: only the pod may still send.
    let waiting = scene.connect(&listener);
    waiting.1.shutdown(std::net::Shutdown::Write).unwrap();
    // LAST-ACK and FIN-WAIT-1, as soon as frames from the pod are lost.
    let last = scene.connect(&listener);
    last.1.shutdown(std::net::Shutdown::Write).unwrap();
    let first = scene.connect(&listener);
    // TIME-WAIT: both have closed, the pod first.
    let over = scene.connect(&listener);
    let was_over = tcp(&over.0, Outbound);
    drop(over.0);
    drop(over.1);
    let mut expected: Vec<OpenSocket> = [&half.0, &waiting.0, &last.0, &first.0]
        .map(|near| tcp(near, Outbound))
        .to_vec();
    assert!(!expected.contains(&was_over));
    scene.expect(expected.clone());
    let mut end = [0];
    assert_eq!(last.0.peek(&mut end).expect("its end"), 0);

    scene.drop_frames_from_the_pod();
    drop(last.0);
    drop(first.0);
    // SYN-RECEIVED: the pod's SYN-ACK is lost, so the node has not seen it either. SYN-SENT: the pod's SYN is
    // lost.
    let opening = start_connecting(scene.lab.node(), (own, 8080).into());
    let asking = start_connecting(scene.inside(), listener.local_addr().unwrap());
    let from = opening.local_addr().unwrap().as_socket().unwrap();
    expected.push(OpenSocket {
        protocol: SocketProtocol::Tcp,
        local: (own, 8080).into(),
        remote: from,
        direction: Unconfirmed,
    });
    scene.expect(expected);
    drop((opening, asking, server, half, waiting, last.1, first.1));
}

#[test]
fn connected_datagram_sockets_are_found() {
    let mut scene = Scene::new(3);
    let mut kept = Vec::new();
    let mut expected = Vec::new();
    for v6 in [false, true] {
        let (own, far) = scene.addresses(v6);
        let socket = scene.pod.pod().udp_socket((far, 4433));
        expected.push(OpenSocket {
            protocol: SocketProtocol::Udp,
            local: socket.local_addr().unwrap(),
            remote: (far, 4433).into(),
            direction: Outbound,
        });
        kept.push(socket);
        // An unconnected socket has no flow.
        let open = scene.inside().run(|| UdpSocket::bind((own, 0)));
        kept.push(open.expect("bind in the pod"));
    }
    scene.expect(expected);
    drop(kept);
}
