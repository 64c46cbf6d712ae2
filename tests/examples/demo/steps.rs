//! The steps, in the order in which they are told.

use std::{path::PathBuf, process::Command};

use egress_tests::{Agent, addresses::RESOLVER};

use crate::Step;
use crate::scene::{MIRROR, OTHER_PORT, PAYMENTS, PORT, Scene, curl, mirror, payments};
use crate::tell::{check, output, say, title, typed};

/// What is shown while the agent runs.
pub(crate) const STEPS: [fn(&Scene, &Agent) -> Step; 8] = [
    allowed_name,
    other_port,
    other_name,
    literal_address,
    neighbour,
    denial_lines,
    allow_map,
    edited_live,
];

/// Shows the scene without the agent, then starts it.
pub(crate) fn before(scene: &Scene) -> Result<Agent, String> {
    title("A node, two pods, and an internet of network namespaces");
    say(&format!("resolver {RESOLVER}"));
    for (name, address) in [(PAYMENTS, payments()), (MIRROR, mirror())] {
        say(&format!(
            "HTTP server {address}, ports {PORT} and {OTHER_PORT}, called {name}"
        ));
    }
    for (pod, allow) in [
        (&scene.cart, cart_allows()),
        (&scene.mailer, mailer_allows()),
    ] {
        scene.allow(pod, &allow);
        let (namespace, name) = (pod.namespace(), pod.name());
        say(&format!(
            "pod {namespace}/{name}, {}, interface {}",
            pod.ipv4(),
            pod.interface()
        ));
        say(&format!("    egress-agent.dev/allow: {allow}"));
    }

    title("Without the agent, a pod reaches everything");
    let outcome = curl(&scene.cart, &format!("http://{}/", mirror()));
    check(
        outcome.is_answer_of(MIRROR),
        "cart reaches a server that its annotation does not name",
    )?;

    title("The agent starts");
    typed(
        "node",
        "egress-agent run --pods-dir pods --config config.yaml",
    );
    let agent = scene.lab.start_agent(&[&scene.cart, &scene.mailer]);
    check(true, "both pods are enforced")?;
    Ok(agent)
}

fn allowed_name(scene: &Scene, _: &Agent) -> Step {
    title("An allowed name works, on the first SYN");
    let sent_again = scene.cart.syn_retransmissions();
    let outcome = curl(&scene.cart, &format!("http://{PAYMENTS}/"));
    check(
        outcome.is_answer_of(PAYMENTS),
        "cart reaches the server by the name it may use",
    )?;
    let sent_again = scene.cart.syn_retransmissions() - sent_again;
    check(
        sent_again == 0,
        "no SYN had to be sent again: the address was allowed before the answer came",
    )
}

fn other_port(scene: &Scene, agent: &Agent) -> Step {
    title("Another port of the same server is denied");
    let outcome = curl(&scene.cart, &format!("http://{PAYMENTS}:{OTHER_PORT}/"));
    check(
        outcome.is_timeout(),
        "cart gets no connection to a port that the annotation does not list",
    )?;
    let denial = agent.wait_denial("the other port", |denial| {
        denial.of(&scene.cart)
            && denial.dst_ip == Some(payments())
            && denial.dst_port == Some(OTHER_PORT)
    });
    let told = format!(
        "the agent reports it: {}, {}",
        denial.reason,
        denial.dst_names.join(" ")
    );
    check(
        denial.reason == "port_not_allowed" && denial.dst_names == [PAYMENTS],
        &told,
    )
}

fn other_name(scene: &Scene, agent: &Agent) -> Step {
    title("A name that is not allowed does not exist");
    let outcome = curl(&scene.cart, &format!("http://{MIRROR}/"));
    check(
        outcome.is_unknown_name(),
        "cart is told that there is no such name",
    )?;
    let asked = scene.lab.dns().queries_for(MIRROR);
    check(
        asked == 0,
        "the question never left the node: the resolver was not asked",
    )?;
    let denial = agent.wait_denial("the other name", |denial| {
        denial.is_question(&scene.cart, MIRROR)
    });
    check(
        denial.reason == "dns_name",
        &format!("the agent reports it: {}", denial.reason),
    )
}

fn literal_address(scene: &Scene, agent: &Agent) -> Step {
    title("A literal address is denied");
    let outcome = curl(&scene.cart, &format!("http://{}/", mirror()));
    check(
        outcome.is_timeout(),
        "cart gets no connection to an address it has learned from no answer",
    )?;
    let denial = agent.wait_denial("the literal address", |denial| {
        denial.of(&scene.cart) && denial.dst_ip == Some(mirror())
    });
    check(
        denial.dst_port == Some(PORT),
        &format!("the agent reports it: {}", denial.reason),
    )
}

fn neighbour(scene: &Scene, agent: &Agent) -> Step {
    title("What one pod has resolved opens nothing for its neighbour");
    let outcome = curl(&scene.mailer, &format!("http://{MIRROR}/"));
    check(
        outcome.is_answer_of(MIRROR),
        "mailer reaches the server by the name it may use",
    )?;
    let outcome = curl(&scene.mailer, &format!("http://{}/", payments()));
    check(
        outcome.is_timeout(),
        "mailer gets no connection to the address that cart has resolved",
    )?;
    agent.wait_denial("the neighbour", |denial| {
        denial.of(&scene.mailer) && denial.dst_ip == Some(payments())
    });
    let outcome = curl(&scene.cart, &format!("http://{PAYMENTS}/"));
    check(outcome.is_answer_of(PAYMENTS), "cart still reaches it")
}

fn denial_lines(_: &Scene, agent: &Agent) -> Step {
    title("The agent's standard output: one line for each thing denied");
    let denials = agent.denials();
    for denial in &denials {
        output(&denial.text);
    }
    check(
        denials.len() >= 4,
        "every step above that was denied has its line",
    )
}

fn allow_map(scene: &Scene, _: &Agent) -> Step {
    title("The kernel's side, with nothing but bpftool");
    for pin in pins_of_addresses(scene) {
        typed(
            "node",
            &format!("bpftool map dump pinned {}", pin.display()),
        );
        let dump = Command::new("bpftool")
            .args(["map", "dump", "pinned"])
            .arg(&pin)
            .output()
            .map_err(|e| format!("cannot run bpftool: {e}"))?;
        output(&String::from_utf8_lossy(&dump.stdout));
        check(
            dump.status.success(),
            "a map of what cart may reach is pinned under its name",
        )?;
    }
    let allowed = scene.lab.allowed(&scene.cart);
    let only_payments = allowed.len() == 1 && allowed.contains_key(&payments());
    check(
        only_payments,
        &format!("{} is in one of them, and nothing else", payments()),
    )
}

/// The pins of the addresses that the agent, and those that the programs have learned for cart.
fn pins_of_addresses(scene: &Scene) -> [PathBuf; 2] {
    let allow = scene.lab.allow_pin(&scene.cart);
    let learned = allow.with_file_name("learned");
    [allow, learned]
}

fn edited_live(scene: &Scene, agent: &Agent) -> Step {
    title("An annotation is edited while the pod runs");
    let both = format!("{} {MIRROR}:{PORT}", cart_allows());
    say(&format!("cart: egress-agent.dev/allow: {both}"));
    agent.applies_policy_after(&scene.cart, || scene.allow(&scene.cart, &both));
    let outcome = curl(&scene.cart, &format!("http://{MIRROR}/"));
    check(outcome.is_answer_of(MIRROR), "what was added works at once")?;

    say(&format!("cart: egress-agent.dev/allow: {}", cart_allows()));
    agent.applies_policy_after(&scene.cart, || scene.allow(&scene.cart, &cart_allows()));
    let outcome = curl(&scene.cart, &format!("http://{}/", mirror()));
    check(outcome.is_timeout(), "what was removed is cut at once")
}

/// Ends the agent, and looks for what it left.
pub(crate) fn end(scene: &Scene, agent: &mut Agent) -> Step {
    title("The agent ends");
    typed("node", &format!("kill -TERM {}", agent.pid()));
    let status = agent.stop();
    if !status.success() {
        output(&agent.stderr());
    }
    check(status.success(), "it ends without an error")?;
    check(
        scene.lab.all_pins().is_empty(),
        "nothing of it is left in the BPF file system",
    )?;
    let outcome = curl(&scene.cart, &format!("http://{}/", mirror()));
    check(
        outcome.is_answer_of(MIRROR),
        "the pods reach everything again",
    )
}

/// Tells how to go on by hand.
pub(crate) fn how_to_play(scene: &Scene) {
    title("It goes on running. In another terminal, as root:");
    for pod in [&scene.cart, &scene.mailer] {
        say(&format!(
            "ip netns exec {} bash          # be the pod {}",
            pod.netns().name(),
            pod.name()
        ));
    }
    say(&format!(
        "curl http://{PAYMENTS}/                            # in there"
    ));
    say(&format!(
        "ip netns exec {} bash                 # be the node",
        scene.lab.node().name()
    ));
    say(&format!(
        "$EDITOR {}/*.yaml    # edit a manifest",
        scene.lab.pods_dir().display()
    ));
    for pin in pins_of_addresses(scene) {
        say(&format!("bpftool map dump pinned {}", pin.display()));
    }
    say("Denials appear here. Ctrl-C ends it and removes everything.");
    say("If this terminal is killed, `cargo xtask demo --remove` removes what is left.");
}

fn cart_allows() -> String {
    format!("{PAYMENTS}:{PORT}")
}

fn mailer_allows() -> String {
    format!("{MIRROR}:{PORT}")
}
