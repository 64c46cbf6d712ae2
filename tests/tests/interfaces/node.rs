//! The agent locates a pod on its machine by the pod's UID alone.

use std::{
    collections::HashSet,
    fs,
    net::{IpAddr, Ipv4Addr},
    path::PathBuf,
    process::Command,
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
    thread,
};

use egress_agent::host::{Host, HostOptions, Located, Missing};
use egress_tests::{
    Lab, Node, NodePod, Pod, eventually, holds,
    node::{Driver, Hierarchy, Qos, Runtime, pause},
};

/// A UID that no other test has.
fn uid() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!(
        "e9e55e00-{number:04x}-4000-8000-{:012x}",
        std::process::id()
    )
}

/// The machine as an agent on the laboratory's node sees it.
#[track_caller]
fn host(lab: &Lab) -> Host {
    host_with(lab, HostOptions::default())
}

#[track_caller]
fn host_with(lab: &Lab, options: HostOptions) -> Host {
    lab.node()
        .run(|| Host::open(options))
        .expect("the machine can be looked at")
}

fn locate(host: &mut Host, uid: &str) -> Result<Located, Missing> {
    let links = host.links().expect("the kernel lists interfaces");
    host.locate(&links, uid)
}

fn addresses(pod: &Pod) -> Vec<IpAddr> {
    vec![pod.ipv4().into(), pod.ipv6().into()]
}

#[track_caller]
fn assert_located(lab: &Lab, host: &mut Host, pod: &NodePod) -> Located {
    let located = locate(host, pod.uid()).expect("the pod is located");
    assert_eq!(located.interfaces, [lab.ifindex(pod.pod().interface())]);
    assert_eq!(located.addresses, addresses(pod.pod()));
    assert_eq!(located.namespaces.len(), 1);
    located
}

#[test]
fn a_pod_is_found_in_every_cgroup_layout() {
    let lab = Lab::builder().without_dns().build();
    let mut pods = Vec::new();
    for hierarchy in [Hierarchy::V2, Hierarchy::V1] {
        for driver in [Driver::Systemd, Driver::Cgroupfs] {
            for runtime in [Runtime::Containerd, Runtime::Crio] {
                for qos in [Qos::Guaranteed, Qos::Burstable, Qos::BestEffort] {
                    let node = Node {
                        hierarchy,
                        driver,
                        runtime,
                        root: String::new(),
                    };
                    let name = format!("cart{}", pods.len());
                    pods.push(node.run_pod(&lab, &name, &uid(), qos));
                }
            }
        }
    }
    // One host locates all of them: a layout that it learns from one pod does not exclude other layouts.
    let mut host = host(&lab);
    for _ in 0..2 {
        for pod in &pods {
            assert_located(&lab, &mut host, pod);
        }
    }
}

#[test]
fn a_pod_is_found_below_a_custom_cgroup_root() {
    let lab = Lab::builder().without_dns().build();
    for root in ["kubelet", "testroot"] {
        for driver in [Driver::Systemd, Driver::Cgroupfs] {
            let node = Node {
                driver,
                root: root.into(),
                ..Node::default()
            };
            let name = format!("cart-{root}-{driver:?}").to_lowercase();
            let pod = node.run_pod(&lab, &name, &uid(), Qos::Burstable);
            let mut host = host(&lab);
            assert_located(&lab, &mut host, &pod);
            // The location of the cgroup root was learned from the first pod.
            let next = node.run_pod(&lab, &format!("{name}-next"), &uid(), Qos::Guaranteed);
            assert_located(&lab, &mut host, &next);
        }
    }
}

#[test]
fn a_static_pod_is_found_by_its_uid_without_dashes() {
    let lab = Lab::builder().without_dns().build();
    let mut host = host(&lab);
    for driver in [Driver::Systemd, Driver::Cgroupfs] {
        let node = Node {
            driver,
            ..Node::default()
        };
        let uid = uid().replace('-', "");
        let pod = node.run_pod(
            &lab,
            &format!("{driver:?}").to_lowercase(),
            &uid,
            Qos::Guaranteed,
        );
        assert_located(&lab, &mut host, &pod);
    }
}

#[test]
fn every_interface_of_a_pod_is_found() {
    let lab = Lab::builder().without_dns().build();
    let pod = Node::default().run_pod(&lab, "cart", &uid(), Qos::Burstable);
    let second = pod.add_interface(&lab, "net1");
    let located = locate(&mut host(&lab), pod.uid()).unwrap();
    let mut expected = [pod.pod().interface(), &second].map(|name| lab.ifindex(name));
    expected.sort_unstable();
    assert_eq!(located.interfaces, expected);
    let number = pod.pod().ipv4().octets()[2];
    let mut all = addresses(pod.pod());
    all.push(Ipv4Addr::new(10, 2, number, 2).into());
    all.push(format!("fd02:{number:x}::2").parse().unwrap());
    all.sort_unstable();
    assert_eq!(located.addresses, all);
}

#[test]
fn a_starting_pod_is_reported_with_the_missing_prerequisite() {
    let lab = Lab::builder().without_dns().build();
    let mut host = host(&lab);
    let uid = uid();
    assert!(matches!(locate(&mut host, &uid), Err(Missing::Group)));

    let pod = lab.pod_without_interface("shop", "cart");
    let mut pod = Node::default().pod_without_processes(pod, &uid, Qos::Burstable);
    assert!(matches!(locate(&mut host, &uid), Err(Missing::Process)));

    pod.start_container();
    assert!(matches!(locate(&mut host, &uid), Err(Missing::Interface)));

    lab.add_interface(pod.pod());
    assert_located(&lab, &mut host, &pod);
}

#[test]
fn a_pod_with_a_new_sandbox_is_found_in_its_new_network() {
    let lab = Lab::builder().without_dns().build();
    let mut host = host(&lab);
    let mut pod = Node::default().run_pod(&lab, "cart", &uid(), Qos::Burstable);
    let before = assert_located(&lab, &mut host, &pod);

    let old = pod.change_sandbox(lab.pod("shop", "cart"));
    pod.start_container();
    // Both networks as long as both have a process.
    let both = locate(&mut host, pod.uid()).unwrap();
    assert_eq!(both.interfaces.len(), 2);
    assert_eq!(both.namespaces.len(), 2);

    pod.stop_containers();
    drop(old);
    assert!(matches!(
        locate(&mut host, pod.uid()),
        Err(Missing::Process)
    ));
    pod.start_container();
    let after = assert_located(&lab, &mut host, &pod);
    assert_ne!(before.interfaces, after.interfaces);
}

#[test]
fn a_pod_that_has_ended_is_not_found() {
    let lab = Lab::builder().without_dns().build();
    let mut host = host(&lab);
    let mut pod = Node::default().run_pod(&lab, "cart", &uid(), Qos::Burstable);
    let located = assert_located(&lab, &mut host, &pod);
    let uid = pod.uid().to_owned();
    pod.stop_containers();
    assert!(matches!(locate(&mut host, &uid), Err(Missing::Process)));
    assert!(host.sockets(&located.namespaces[0]).is_err());
    drop(pod);
    assert!(matches!(locate(&mut host, &uid), Err(Missing::Group)));
}

#[test]
fn a_stale_list_of_interfaces_gives_a_new_pod_no_interface() {
    let lab = Lab::builder().without_dns().build();
    let mut host = host(&lab);
    let node = Node::default();
    let first = node.run_pod(&lab, "first", &uid(), Qos::Burstable);
    assert_located(&lab, &mut host, &first);
    let stale = host.links().unwrap();
    let number = |host: &mut Host, pod: &NodePod| {
        let links = host.links().unwrap();
        let link = links.iter().find(|link| link.name == pod.pod().interface());
        link.and_then(|link| link.peer).map(|peer| peer.nsid)
    };
    let of_first = number(&mut host, &first).expect("the first pod's namespace has a number");
    let name = first.pod().interface().to_owned();
    drop(first);
    eventually("the first pod's interface goes", || {
        let gone = !host.links().unwrap().iter().any(|link| link.name == name);
        holds(gone)
    });
    // The kernel reuses the free namespace id for a later namespace.
    let mut pods = Vec::new();
    let next = eventually("a namespace gets the number of the first", || {
        let pod = node.run_pod(&lab, &format!("next{}", pods.len()), &uid(), Qos::Burstable);
        let found = number(&mut host, &pod) == Some(of_first);
        let uid = pod.uid().to_owned();
        pods.push(pod);
        found.then_some(uid)
    });
    let missed = host.locate(&stale, &next);
    assert!(missed.is_err(), "{missed:?}");
    assert!(locate(&mut host, &next).is_ok());
}

#[test]
fn a_pod_in_the_hosts_network_is_recognised() {
    let lab = Lab::builder().without_dns().build();
    let mut host = host(&lab);
    let pod = lab.pod_without_interface("shop", "agent");
    let mut pod = Node::default().pod_without_processes(pod, &uid(), Qos::Burstable);
    pod.adopt(lab.run_on_node(&mut pause()));
    let missed = locate(&mut host, pod.uid());
    assert!(matches!(missed, Err(Missing::HostNetwork)), "{missed:?}");

    // A process of the runtime in the host's network does not hide the pod's network.
    pod.start_container();
    lab.add_interface(pod.pod());
    assert_located(&lab, &mut host, &pod);
}

#[test]
fn a_pod_without_a_host_end_is_distinguished_from_a_starting_pod() {
    let lab = Lab::builder().without_dns().build();
    let mut host = host(&lab);
    let pod = lab.pod_without_interface("shop", "cart");
    let mut pod = Node::default().pod_without_processes(pod, &uid(), Qos::Burstable);
    pod.start_container();
    // Like a macvlan or a virtual function: the other end of the interface is not on the host.
    let elsewhere = lab.pod_without_interface("shop", "elsewhere");
    pod.pod().netns().ip_batch(&format!(
        "link add net0 type veth peer name net0 netns {}\n",
        elsewhere.netns().name()
    ));
    match locate(&mut host, pod.uid()) {
        Err(missing @ Missing::HostEnd(_)) => {
            assert!(missing.to_string().contains("(net0)"), "{missing}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_namespace_that_a_program_creates_does_not_hide_the_pods_network() {
    let lab = Lab::builder().without_dns().build();
    let mut host = host(&lab);
    let mut pod = Node::default().run_pod(&lab, "cart", &uid(), Qos::Burstable);
    let own = pod
        .pod()
        .netns()
        .run(|| fs::read_link("/proc/thread-self/ns/net").unwrap());
    for _ in 0..3 {
        let mut unshare = Command::new("unshare");
        unshare.args(["--net", "sleep", "infinity"]);
        let program = pod.pod().start(&mut unshare);
        let pid = pod.adopt(program);
        eventually("the program is in a network of its own", || {
            let link = fs::read_link(format!("/proc/{pid}/ns/net")).ok()?;
            holds(link != own)
        });
    }
    assert_located(&lab, &mut host, &pod);
}

#[test]
fn short_lived_processes_do_not_disturb_locating() {
    let lab = Lab::builder().without_dns().build();
    let mut host = host(&lab);
    let node = Node::default();
    let steady = node.run_pod(&lab, "steady", &uid(), Qos::Burstable);
    let restless = node.run_pod(&lab, "restless", &uid(), Qos::Burstable);
    let (uid, interface) = (
        restless.uid().to_owned(),
        lab.ifindex(restless.pod().interface()),
    );
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut restless = restless;
            for _ in 0..100 {
                restless.stop_containers();
                restless.start_container();
            }
            done.store(true, Ordering::Release);
        });
        let mut outcomes = HashSet::new();
        while !done.load(Ordering::Acquire) {
            assert_located(&lab, &mut host, &steady);
            match locate(&mut host, &uid) {
                Ok(located) => {
                    assert_eq!(located.interfaces, [interface]);
                    outcomes.insert("found");
                }
                // A process that was just started is in its parent's network until it is moved into the pod's
                // cgroup; then it is in the pod's network.
                Err(Missing::Process | Missing::Group) => _ = outcomes.insert("missed"),
                Err(other) => panic!("{other}"),
            }
        }
        assert!(!outcomes.is_empty());
    });
}

#[test]
fn processes_in_a_threaded_cgroup_are_found() {
    let lab = Lab::builder().without_dns().build();
    let pod = lab.pod("shop", "cart");
    let mut pod = Node::default().pod_without_processes(pod, &uid(), Qos::Burstable);
    let pid = pod.start_container();
    let threaded = pod.container_group().join("threads");
    fs::create_dir(&threaded).unwrap();
    let made = fs::write(threaded.join("cgroup.type"), "threaded")
        .and_then(|()| fs::write(threaded.join("cgroup.threads"), pid.to_string()));
    let located = locate(&mut host(&lab), pod.uid());
    // Moves the thread back to its process's cgroup, so that the cgroup can be removed.
    let back = fs::write(
        pod.container_group().join("cgroup.threads"),
        pid.to_string(),
    );
    let removed = fs::remove_dir(&threaded);
    made.unwrap();
    back.unwrap();
    removed.unwrap();
    assert_eq!(
        located.unwrap().interfaces,
        [lab.ifindex(pod.pod().interface())]
    );
}

#[test]
fn a_pod_cannot_impersonate_another_by_naming_its_cgroups() {
    let lab = Lab::builder().without_dns().build();
    let node = Node {
        driver: Driver::Cgroupfs,
        ..Node::default()
    };
    let mut liar = node.run_pod(&lab, "liar", &uid(), Qos::Burstable);
    let victim = uid();
    // A cgroup below the container's, named as the victim's would be.
    let false_group = liar
        .container_group()
        .join("kubepods")
        .join(format!("pod{victim}"));
    fs::create_dir_all(&false_group).unwrap();
    let pid = liar.start_container();
    fs::write(false_group.join("cgroup.procs"), pid.to_string()).unwrap();
    let missed = locate(&mut host(&lab), &victim);
    let located = locate(&mut host(&lab), liar.uid());
    fs::write(liar.container_group().join("cgroup.procs"), pid.to_string()).unwrap();
    fs::remove_dir(&false_group).unwrap();
    fs::remove_dir(false_group.parent().unwrap()).unwrap();
    assert!(matches!(missed, Err(Missing::Group)), "{missed:?}");
    assert_eq!(
        located.unwrap().interfaces,
        [lab.ifindex(liar.pod().interface())]
    );
}

#[test]
fn an_invalid_uid_is_never_used_in_a_path() {
    let lab = Lab::builder().without_dns().build();
    let mut host = host(&lab);
    for uid in ["", "../../..", "a/b", "0a\n"] {
        let missed = locate(&mut host, uid);
        assert!(matches!(missed, Err(Missing::Uid(_))), "{uid:?} {missed:?}");
    }
}

#[test]
fn processes_of_another_pid_namespace_are_reported_as_foreign() {
    let lab = Lab::builder().without_dns().build();
    let pod = Node::default().run_pod(&lab, "cart", &uid(), Qos::Burstable);
    // A cgroup tree as an agent outside the host's PID namespace sees it.
    let mount = lab.directory().join("cgroup");
    let group = Node::default().group(pod.uid(), Qos::Burstable);
    let inside = group
        .strip_prefix(Node::default().mount())
        .unwrap()
        .to_owned();
    fs::create_dir_all(mount.join(&inside)).unwrap();
    fs::write(mount.join(&inside).join("cgroup.procs"), "0\n0\n").unwrap();
    let mut host = host_with(
        &lab,
        HostOptions {
            cgroups: vec![mount],
            ..HostOptions::default()
        },
    );
    let missed = locate(&mut host, pod.uid());
    assert!(
        matches!(missed, Err(Missing::ForeignProcesses)),
        "{missed:?}"
    );
}

#[test]
fn a_pod_is_found_by_its_processes_without_cgroups() {
    let lab = Lab::builder().without_dns().build();
    let pod = Node::default().run_pod(&lab, "cart", &uid(), Qos::Burstable);
    let mut host = host_with(
        &lab,
        HostOptions {
            cgroups: vec![PathBuf::from("/nonexistent")],
            ..HostOptions::default()
        },
    );
    assert_located(&lab, &mut host, &pod);
}

#[test]
fn interfaces_that_may_be_pods_are_distinguished_from_others() {
    let lab = Lab::builder().without_dns().build();
    let (cart, pay) = (lab.pod("shop", "cart"), lab.pod("shop", "pay"));
    lab.node().ip_batch(&format!(
        "link add docker0 type bridge\n\
         link set {pay} master docker0\n\
         link add here type veth peer name there\n",
        pay = pay.interface()
    ));
    let mut host = host(&lab);
    let links = host.links().unwrap();
    let exclude = ["docker*".to_owned(), "up*".to_owned()];
    let found: Vec<&str> = links.pod_like(&exclude).map(|l| l.name.as_str()).collect();
    assert_eq!(found, [cart.interface()]);
    let names = |exclude: &[String]| -> HashSet<String> {
        links.pod_like(exclude).map(|l| l.name.clone()).collect()
    };
    let all = [cart.interface(), pay.interface(), "uplink"].map(str::to_owned);
    assert_eq!(names(&[]), HashSet::from(all));
    let pay = links.get(lab.ifindex(pay.interface())).unwrap();
    assert_eq!(
        (pay.kind.as_str(), pay.master.as_deref(), pay.up),
        ("veth", Some("docker0"), true)
    );
}
