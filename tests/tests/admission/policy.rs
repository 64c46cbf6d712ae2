//! Evaluates the admission policy's expressions, and runs Kubernetes' own plugin beside them.

use std::{
    cell::RefCell,
    collections::HashMap,
    env,
    ffi::OsStr,
    io::{BufRead as _, BufReader, Lines, Write as _},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::Arc,
};

use cel::{Context, Program, Value as Cel, extractors::This};
use regex::Regex;
use serde_json::{Value, json};

use egress_tests::yaml;

thread_local! {
    /// Compilation takes longer than matching.
    static COMPILED: RefCell<HashMap<String, Regex>> = RefCell::default();
}

/// The policy's file, in `manifests`.
const FILE: &str = "components/admission/policy.yaml";

/// The policy, compiled.
pub(crate) struct Policy {
    variables: Vec<(String, Program)>,
    validations: Vec<(Program, Option<Program>, String)>,
    plugin: Option<RefCell<Plugin>>,
}

/// Kubernetes' own plugin (plugin.go), whose path is in `ADMISSION_PLUGIN`.
struct Plugin {
    process: Child,
    requests: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
}

impl Plugin {
    fn start(program: &OsStr) -> Self {
        let mut process = Command::new(program)
            .arg(yaml::directory().join(FILE))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("ADMISSION_PLUGIN {}: {error}", program.display()));
        let requests = process.stdin.take().expect("piped");
        let answers = BufReader::new(process.stdout.take().expect("piped")).lines();
        Self {
            process,
            requests,
            answers,
        }
    }

    fn ask(&mut self, object: &Value, old: &Value) -> Option<String> {
        let request = json!({"object": object, "oldObject": old});
        writeln!(self.requests, "{request}").expect("the plugin reads");
        let line = self.answers.next().expect("an answer").expect("an answer");
        let answer: Value = serde_json::from_str(&line).expect("an answer");
        assert_eq!(answer.get("failed"), None, "{request}");
        Some(answer.get("rejected")?.as_str()?.to_owned())
    }
}

impl Drop for Plugin {
    fn drop(&mut self) {
        let _ended = self.process.kill();
        let _status = self.process.wait();
    }
}

impl Policy {
    pub(crate) fn read() -> Self {
        let objects = yaml::objects(FILE);
        let spec = &objects[0]["spec"];
        let compile = |text: &Value| {
            let text = text.as_str().expect("an expression");
            Program::compile(text).unwrap_or_else(|error| panic!("{text}\n{error}"))
        };
        Self {
            variables: spec["variables"]
                .as_array()
                .expect("variables")
                .iter()
                .map(|variable| {
                    let name = variable["name"].as_str().expect("a name").to_owned();
                    (name, compile(&variable["expression"]))
                })
                .collect(),
            validations: spec["validations"]
                .as_array()
                .expect("validations")
                .iter()
                .map(|validation| {
                    (
                        compile(&validation["expression"]),
                        validation.get("messageExpression").map(compile),
                        validation["message"]
                            .as_str()
                            .expect("a message")
                            .to_owned(),
                    )
                })
                .collect(),
            plugin: env::var_os("ADMISSION_PLUGIN")
                .map(|program| RefCell::new(Plugin::start(&program))),
        }
    }

    /// The reason why the object is rejected, if it is. Kubernetes' own plugin must agree, if there is one.
    pub(crate) fn judge(&self, object: &Value, old: &Value) -> Option<String> {
        let rejected = self.evaluate(object, old);
        if let Some(plugin) = &self.plugin {
            let theirs = plugin.borrow_mut().ask(object, old);
            assert_eq!(rejected, theirs, "here and in Kubernetes: {object}");
        }
        rejected
    }

    /// The API server evaluates a variable when an expression uses it; this evaluates all of them in order.
    fn evaluate(&self, object: &Value, old: &Value) -> Option<String> {
        let mut context = Context::default();
        context.add_function("findAll", find_all).expect("findAll");
        context.add_function("find", find).expect("find");
        context.add_variable("object", object).expect("object");
        context.add_variable("oldObject", old).expect("oldObject");
        let mut variables = HashMap::new();
        for (name, program) in &self.variables {
            context.add_variable_from_value("variables", variables.clone());
            match program.execute(&context) {
                Ok(value) => {
                    variables.insert(name.clone(), value);
                }
                // Expressions that use this variable fail.
                Err(error) => eprintln!("{name}: {error}"),
            }
        }
        context.add_variable_from_value("variables", variables);
        for (program, message, fallback) in &self.validations {
            match program.execute(&context) {
                Ok(Cel::Bool(true)) => {}
                Ok(Cel::Bool(false)) => {
                    let Some(message) = message else {
                        return Some(fallback.clone());
                    };
                    match message.execute(&context) {
                        Ok(Cel::String(text)) => return Some(text.to_string()),
                        other => panic!("{fallback}: no message: {other:?}"),
                    }
                }
                other => panic!("{fallback}: no verdict: {other:?}"),
            }
        }
        None
    }
}

#[expect(
    clippy::needless_pass_by_value,
    reason = "functions of expressions take their arguments by value"
)]
/// Kubernetes' function: every match of a regular expression, from left to right.
pub(crate) fn find_all(This(text): This<Arc<String>>, pattern: Arc<String>) -> Cel {
    let found = regex(&pattern)
        .find_iter(&text)
        .map(|found| found.as_str().to_owned().into())
        .collect::<Vec<Cel>>();
    Cel::List(Arc::new(found))
}

#[expect(
    clippy::needless_pass_by_value,
    reason = "functions of expressions take their arguments by value"
)]
/// Kubernetes' function: the first match of a regular expression, or an empty string.
pub(crate) fn find(This(text): This<Arc<String>>, pattern: Arc<String>) -> Cel {
    regex(&pattern)
        .find(&text)
        .map_or("", |found| found.as_str())
        .into()
}

fn regex(pattern: &str) -> Regex {
    COMPILED.with_borrow_mut(|compiled| {
        compiled
            .entry(pattern.to_owned())
            .or_insert_with(|| Regex::new(pattern).unwrap_or_else(|error| panic!("{error}")))
            .clone()
    })
}
