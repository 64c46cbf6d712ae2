//! The demonstration that `cargo xtask demo` runs: a small internet of network namespaces, two
//! pods with different annotations, and the agent between them.
//!
//! What is told is also checked: a step that does not come out as told ends the demonstration with
//! an error. Everything made here is gone when it ends, however it ends.

mod scene;
mod steps;
mod stop;
mod tell;

use std::env;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use egress_tests::{Lab, leftovers};

use scene::Scene;
use stop::Stop;

/// How a step fails: what did not come out as told.
type Step = Result<(), String>;

fn main() -> ExitCode {
    // Before any thread is started, so that every thread leaves the signals to this one.
    let stop = Stop::on_signals();
    let arguments: Vec<String> = env::args().skip(1).collect();
    let result = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => show(&stop, false),
        ["--keep"] => show(&stop, true),
        ["--remove"] => remove(),
        _ => Err("usage: demo [--keep | --remove]".to_owned()),
    };
    if let Err(error) = result {
        eprintln!("\nthe demonstration failed: {error}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

fn show(stop: &Stop, keep: bool) -> Step {
    let scene = Scene::build();
    let mut agent = steps::before(&scene)?;
    for step in steps::STEPS {
        stop.check()?;
        step(&scene, &agent)?;
    }
    if keep {
        steps::how_to_play(&scene);
        let mut shown = agent.denials().len();
        while stop.check().is_ok() {
            // What the pods are denied meanwhile, as it comes.
            for denial in agent.denials().iter().skip(shown) {
                tell::output(&denial.text);
                shown += 1;
            }
            thread::sleep(Duration::from_millis(100));
        }
    }
    steps::end(&scene, &mut agent)?;
    drop(agent);
    drop(scene);
    let left = leftovers(std::process::id());
    tell::check(
        left.is_empty(),
        "every namespace of the demonstration is gone",
    )
}

/// Building a laboratory removes what killed processes left of theirs; and so does the scene.
fn remove() -> Step {
    drop(Lab::builder().without_dns().build());
    scene::remove_configuration_of_the_dead();
    tell::check(true, "what killed demonstrations had left is gone")
}
