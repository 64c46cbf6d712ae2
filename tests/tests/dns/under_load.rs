//! Lookups and connections without a pause, while agents end and others take over.

use std::{
    net::IpAddr,
    path::Path,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use egress_tests::{Agent, Lab, Pod, StopAtEnd, TcpEcho, addresses::server, eventually, holds};

const NAMES: usize = 40;
/// The addresses that a name has in turn, one a second.
const ADDRESSES: u64 = 5;

/// A pod that looks a name up and connects to its address, some 200 times a second.
struct Scene {
    lab: Lab,
    pod: Pod,
    web: TcpEcho,
    /// How many lookups and connections have succeeded.
    lookups: AtomicU64,
}

impl Scene {
    fn new() -> Self {
        let lab = Lab::builder().config("dns.learn", "kernel").build();
        let web = lab.serve_tcp(443);
        let pod = lab.pod("shop", "cart");
        lab.write_pod(&pod, &[("allow", "*.test:443")]);
        Self {
            lab,
            pod,
            web,
            lookups: AtomicU64::new(0),
        }
    }

    /// Runs this under the load, and some seconds more. Each lookup and each connection must succeed at its first try, and
    /// nothing else is reached. `agents` returns the agent that runs at its end.
    #[track_caller]
    fn under_load(&self, agents: impl FnOnce() -> Agent) {
        let is_over = AtomicBool::new(false);
        let agent = thread::scope(|scope| {
            let load = scope.spawn(|| self.load(&is_over));
            self.wait_lookups(200);
            let agent = {
                let _over = StopAtEnd(&is_over);
                let agent = agents();
                if !load.is_finished() {
                    self.wait_lookups(500);
                }
                agent
            };
            load.join().expect("every lookup and connection succeeds");
            agent
        });
        assert_eq!(self.pod.syn_retransmissions(), 0);
        let denials = agent.denials();
        let others = denials.iter().filter(|d| d.dst_ip != Some(elsewhere()));
        assert_eq!(others.count(), 0, "{denials:?}");
        let lookups = self.lookups.load(Ordering::Relaxed);
        eventually("the server has accepted every connection", || {
            holds(self.web.peers().len() as u64 >= lookups)
        });
    }

    /// Waits for this many more lookups.
    #[track_caller]
    fn wait_lookups(&self, more: u64) {
        let before = self.lookups.load(Ordering::Relaxed);
        eventually(&format!("{more} lookups and connections"), || {
            holds(self.lookups.load(Ordering::Relaxed) >= before + more)
        });
    }

    #[track_caller]
    fn load(&self, is_over: &AtomicBool) {
        let names: Vec<String> = (0..NAMES).map(|n| format!("n{n}.test")).collect();
        let began = Instant::now();
        let mut changed_in = None;
        while !is_over.load(Ordering::Relaxed) {
            let second = began.elapsed().as_secs();
            if changed_in != Some(second) {
                changed_in = Some(second);
                for (n, name) in names.iter().enumerate() {
                    self.lab.dns().addresses(name, &[address_of(n, second)]);
                }
                assert!(!self.pod.reaches(elsewhere()), "no name has this address");
            }
            let n = self.lookups.load(Ordering::Relaxed) as usize % NAMES;
            let address = address_of(n, second);
            assert_eq!(self.pod.lookup(&names[n]), [address]);
            drop(self.pod.reach_tcp((address, 443)));
            self.lookups.fetch_add(1, Ordering::Relaxed);
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Starts an agent that takes over when the running one ends.
    #[track_caller]
    fn stand_by(&self, socket: &Path) -> Agent {
        // As in a cluster, where each agent's pod has its own directory for the socket.
        let socket = socket.to_str().expect("a path in UTF-8");
        self.lab.edit_config("socket", socket);
        let standby = self.lab.spawn_agent(&["--take-over", "--keep-enforcing"]);
        standby.wait_log("that it stands by", |line| line.contains("standing by"));
        standby
    }
}

/// An address that no name has.
fn elsewhere() -> IpAddr {
    server(250)
}

fn address_of(name: usize, second: u64) -> IpAddr {
    let host = 1 + name as u64 * ADDRESSES + second % ADDRESSES;
    server(u8::try_from(host).expect("at most 200"))
}

#[test]
fn no_lookup_fails_while_the_agent_is_killed_and_another_starts_a_minute_later() {
    const WITHOUT_AGENT: Duration = Duration::from_secs(60);
    let scene = Scene::new();
    let mut agent = scene.lab.start_agent(&[&scene.pod]);
    scene.under_load(|| {
        agent.kill();
        thread::sleep(WITHOUT_AGENT);
        scene.lab.start_agent(&[&scene.pod])
    });
}

#[test]
fn no_lookup_fails_while_agents_take_over_from_each_other() {
    let scene = Scene::new();
    let mut agent = scene
        .lab
        .start_agent_with(&["--keep-enforcing"], &[&scene.pod]);
    scene.under_load(|| {
        for n in 0..4 {
            let socket = scene.lab.directory().join(format!("standby-{n}.sock"));
            let standby = scene.stand_by(&socket);
            assert!(agent.stop().success());
            standby.wait_ready();
            agent = standby;
        }
        agent
    });
}

#[test]
fn no_lookup_fails_while_an_agent_ends_and_the_next_one_starts() {
    let scene = Scene::new();
    let arguments = ["--keep-enforcing"];
    let mut agent = scene.lab.start_agent_with(&arguments, &[&scene.pod]);
    scene.under_load(|| {
        for _ in 0..4 {
            assert!(agent.stop().success());
            agent = scene.lab.start_agent_with(&arguments, &[&scene.pod]);
        }
        agent
    });
}
