//! Widely used resolvers, in place of [`crate::DnsServer`].

use std::{
    fs,
    net::IpAddr,
    process::{Command, Stdio},
};

use crate::{
    Lab, Running, SHORT,
    addresses::{RESOLVER, RESOLVER6},
    dns::{RecordType, ResponseCode},
    eventually,
};

impl Lab {
    /// Starts a program as the resolver, and waits until it answers for `shop.test`. The laboratory must be
    /// built without its own DNS.
    #[track_caller]
    pub fn run_resolver(&self, command: &mut Command) -> Running {
        let log = self.directory().join("resolver.log");
        let file = fs::File::create(&log).expect("a file for the resolver's log");
        command.stdout(Stdio::null()).stderr(file);
        let mut running = self.run_outside(command);
        let probe = self.pod("lab", "probe");
        eventually("the resolver answers", || {
            if let Some(status) = running.ended() {
                let log_text = fs::read_to_string(&log).unwrap_or_default();
                panic!("the resolver ended with {status}: {log_text}");
            }
            let answer = probe.try_resolve(RESOLVER, "shop.test", RecordType::A, SHORT)?;
            (answer.code == ResponseCode::NoError).then_some(())
        });
        running
    }
}

/// A command for unbound on the resolver's addresses, with the zone `test` from this file in the laboratory's
/// directory.
#[must_use]
pub fn unbound(lab: &Lab, zone_file: &str) -> Command {
    let server = format!(
        "\x20 interface: {RESOLVER}\n\
         \x20 interface: {RESOLVER6}\n\
         \x20 access-control: ::0/0 allow\n\
         \x20 rrset-roundrobin: no\n"
    );
    let zones = format!(
        "auth-zone:\n\
         \x20 name: \"test.\"\n\
         \x20 zonefile: \"{}/{zone_file}\"\n\
         \x20 for-downstream: yes\n\
         \x20 for-upstream: no\n",
        lab.directory().display()
    );
    unbound_with(lab, "unbound.conf", &server, &zones)
}

/// A command for unbound on the loopback interface of a pod. It queries this server, over TCP only.
#[must_use]
pub fn unbound_over_tcp(lab: &Lab, upstream: IpAddr) -> Command {
    let server = "\x20 interface: 127.0.0.1\n\
                  \x20 tcp-upstream: yes\n";
    let zones = format!(
        "forward-zone:\n\
         \x20 name: \".\"\n\
         \x20 forward-addr: {upstream}\n"
    );
    let mut command = unbound_with(lab, "unbound-in-pod.conf", server, &zones);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    command
}

/// A command for unbound in the foreground, with further lines in its section `server`, and with these zones.
fn unbound_with(lab: &Lab, file: &str, server: &str, zones: &str) -> Command {
    let directory = lab.directory();
    let configuration = format!(
        "server:\n\
         \x20 access-control: 0.0.0.0/0 allow\n\
         \x20 username: \"\"\n\
         \x20 chroot: \"\"\n\
         \x20 directory: \"{}\"\n\
         \x20 pidfile: \"\"\n\
         \x20 use-syslog: no\n\
         \x20 do-daemonize: no\n\
         \x20 module-config: \"iterator\"\n\
         \x20 num-threads: 1\n\
         \x20 local-zone: \"test.\" nodefault\n\
         {server}\
         remote-control:\n\
         \x20 control-enable: no\n\
         {zones}",
        directory.display()
    );
    let file = directory.join(file);
    fs::write(&file, configuration).expect("write a configuration");
    let mut command = Command::new("/usr/sbin/unbound");
    command.arg("-d").arg("-c").arg(file);
    command
}

/// A command for dnsmasq on the resolver's addresses. It knows no names yet.
#[must_use]
pub fn dnsmasq(lab: &Lab) -> Command {
    let mut command = Command::new("/usr/sbin/dnsmasq");
    command
        .args([
            "--keep-in-foreground",
            "--conf-file=/dev/null",
            "--no-resolv",
            "--no-hosts",
            "--user=root",
            "--bind-interfaces",
            "--log-facility=-",
        ])
        .arg(format!(
            "--pid-file={}/dnsmasq.pid",
            lab.directory().display()
        ))
        .arg(format!("--listen-address={RESOLVER}"))
        .arg(format!("--listen-address={RESOLVER6}"));
    command
}

/// A command for BIND on these addresses, with the zone `test` from this file in the laboratory's directory.
#[must_use]
pub fn named(lab: &Lab, addresses: &[IpAddr], zone_file: &str) -> Command {
    // BIND listens only on addresses of interfaces.
    for address in addresses {
        let outside = lab.outside();
        outside.ip_batch(&format!("address add {address} dev lo\n"));
    }
    let listen = |is: fn(&IpAddr) -> bool| -> String {
        let chosen = addresses.iter().filter(|address| is(address));
        chosen.fold(String::new(), |list, address| format!("{list}{address}; "))
    };
    let configuration = format!(
        "options {{\n\
         \x20 directory \"{directory}\";\n\
         \x20 listen-on {{ {v4}}};\n\
         \x20 listen-on-v6 {{ {v6}}};\n\
         \x20 allow-query {{ any; }};\n\
         \x20 recursion no;\n\
         \x20 dnssec-validation no;\n\
         \x20 pid-file none;\n\
         \x20 session-keyfile none;\n\
         \x20 lock-file none;\n\
         }};\n\
         controls {{ }};\n\
         zone \"test\" {{ type primary; file \"{zone_file}\"; }};\n",
        directory = lab.directory().display(),
        v4 = listen(IpAddr::is_ipv4),
        v6 = listen(IpAddr::is_ipv6),
    );
    let file = lab.directory().join("named.conf");
    fs::write(&file, configuration).expect("write a configuration");
    let mut command = Command::new("/usr/sbin/named");
    command.args(["-g", "-n", "1", "-c"]).arg(file);
    command
}

/// A command for Knot Resolver on the resolver's addresses; it queries another server for names of `test`.
#[must_use]
pub fn kresd(lab: &Lab, upstream: IpAddr) -> Command {
    let directory = lab.directory();
    let configuration = format!(
        "net.listen('{RESOLVER}', 53, {{ kind = 'dns' }})\n\
         net.listen('{RESOLVER6}', 53, {{ kind = 'dns' }})\n\
         cache.open(10 * MB, 'lmdb://{directory}/cache')\n\
         trust_anchors.remove('.')\n\
         policy.add(policy.suffix(policy.STUB('{upstream}'), {{ todname('test.') }}))\n",
        directory = directory.display()
    );
    let file = directory.join("kresd.conf");
    fs::write(&file, configuration).expect("write a configuration");
    let mut command = Command::new("/usr/sbin/kresd");
    command
        .args(["--noninteractive", "--config"])
        .arg(file)
        .arg(directory);
    command
}
