//! The small internet: a resolver, two HTTP servers, and two pods.

use std::fs;
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use egress_tests::addresses::{RESOLVER, server};
use egress_tests::{Lab, Namespace, Pod};

use crate::tell;

/// The server that cart may use.
pub(crate) const PAYMENTS: &str = "api.payments.test";
/// The server that mailer may use.
pub(crate) const MIRROR: &str = "mirror.test";
/// The port that pods may use.
pub(crate) const PORT: u16 = 80;
/// A port that answers too, but that no pod may use.
pub(crate) const OTHER_PORT: u16 = 8080;

/// Where `ip netns exec` takes a namespace's own files of `/etc` from.
const NETNS_CONFIGURATION: &str = "/etc/netns";

/// What the demonstration happens in. Gone when dropped.
pub(crate) struct Scene {
    pub(crate) cart: Pod,
    pub(crate) mailer: Pod,
    configuration: Vec<PathBuf>,
    // Last: the pods' interfaces are on its node.
    pub(crate) lab: Lab,
}

impl Scene {
    pub(crate) fn build() -> Self {
        let lab = Lab::new();
        for (name, address) in [(PAYMENTS, payments()), (MIRROR, mirror())] {
            lab.dns().addresses(name, &[address]);
            for port in [PORT, OTHER_PORT] {
                serve(lab.outside(), address, port, name);
            }
        }
        let cart = lab.pod("shop", "cart");
        let mailer = lab.pod("shop", "mailer");
        let configuration = [&cart, &mailer]
            .map(|pod| configure_resolver(pod.netns()))
            .into();
        Self {
            cart,
            mailer,
            configuration,
            lab,
        }
    }

    /// Writes the manifest of a pod that may reach these destinations.
    pub(crate) fn allow(&self, pod: &Pod, allow: &str) {
        self.lab.write_pod(pod, &[("allow", allow)]);
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        for directory in &self.configuration {
            // A failure cannot be helped; `--remove` finds what is left.
            let _ = fs::remove_dir_all(directory);
        }
    }
}

/// Address of [`PAYMENTS`].
pub(crate) fn payments() -> IpAddr {
    server(10)
}

/// Address of [`MIRROR`].
pub(crate) fn mirror() -> IpAddr {
    server(20)
}

/// The command that runs `curl` in a pod, as a person would type it.
pub(crate) fn curl(pod: &Pod, url: &str) -> Outcome {
    const ARGUMENTS: [&str; 4] = ["--silent", "--show-error", "--max-time", "1"];
    tell::typed(pod.name(), &format!("curl {} {url}", ARGUMENTS.join(" ")));
    let output = Command::new("ip")
        .args([
            "netns",
            "exec",
            pod.netns().name(),
            "curl",
            "--noproxy",
            "*",
        ])
        .args(ARGUMENTS)
        .arg(url)
        .output()
        .expect("ip, of the package iproute2");
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).trim_end().to_owned();
    tell::output(&text);
    Outcome {
        code: output.status.code(),
        text,
    }
}

/// How curl ended.
pub(crate) struct Outcome {
    code: Option<i32>,
    text: String,
}

impl Outcome {
    /// Whether the server of this name answered.
    pub(crate) fn is_answer_of(&self, name: &str) -> bool {
        self.code == Some(0) && self.text == greeting(name)
    }

    /// Whether the name was not resolved.
    pub(crate) fn is_unknown_name(&self) -> bool {
        self.code == Some(6)
    }

    /// Whether there was no connection within the time given.
    pub(crate) fn is_timeout(&self) -> bool {
        self.code == Some(28)
    }
}

fn greeting(name: &str) -> String {
    format!("hello from {name}")
}

/// An HTTP server that greets, for as long as this process lives.
fn serve(outside: &Namespace, address: IpAddr, port: u16, name: &'static str) {
    let listener = outside
        .run(|| TcpListener::bind((address, port)))
        .unwrap_or_else(|e| panic!("listen on {address}:{port}: {e}"));
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            // A client that went away is no concern of the server's.
            thread::spawn(move || drop(greet(&stream, name)));
        }
    });
}

fn greet(mut stream: &TcpStream, name: &str) -> io::Result<()> {
    let request = BufReader::new(stream);
    for line in request.lines() {
        if line?.is_empty() {
            break;
        }
    }
    let body = greeting(name);
    let length = body.len() + 1;
    write!(
        stream,
        "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}\n"
    )
}

/// Gives `ip netns exec` the pod's own resolver, in files it mounts over those of `/etc`.
fn configure_resolver(netns: &Namespace) -> PathBuf {
    let directory = Path::new(NETNS_CONFIGURATION).join(netns.name());
    let write = || {
        fs::create_dir_all(&directory)?;
        fs::write(
            directory.join("resolv.conf"),
            format!("nameserver {RESOLVER}\n"),
        )?;
        fs::write(directory.join("nsswitch.conf"), "hosts: files dns\n")
    };
    write().unwrap_or_else(|e| panic!("write into {}: {e}", directory.display()));
    directory
}

/// Removes the files of laboratories' namespaces that are gone.
pub(crate) fn remove_configuration_of_the_dead() {
    for entry in fs::read_dir(NETNS_CONFIGURATION)
        .into_iter()
        .flatten()
        .flatten()
    {
        let name = entry.file_name();
        let of_a_laboratory = name.to_string_lossy().starts_with("eg-");
        if of_a_laboratory && !Path::new("/run/netns").join(&name).exists() {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}
