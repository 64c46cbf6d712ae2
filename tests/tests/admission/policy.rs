//! Evaluates the expressions of admission policies, and runs Kubernetes' own plugin beside them.

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

/// The file of the policy about annotations, in `manifests`.
const ANNOTATIONS: &str = "components/admission/policy.yaml";

/// A policy, compiled.
pub(crate) struct Policy {
    conditions: Vec<Program>,
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

/// The object that the API server is asked to store.
struct Request<'a> {
    object: &'a Value,
    /// The stored object; null for an object that is created.
    old: &'a Value,
    /// The account, as the API server authenticates it: `username`, and perhaps `extra`.
    user: &'a Value,
}

impl Plugin {
    fn start(program: &OsStr, policy: &str) -> Self {
        let mut process = Command::new(program)
            .arg(yaml::directory().join(policy))
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

    fn ask(&mut self, request: &Request<'_>) -> Option<String> {
        let request = json!({
            "object": request.object, "oldObject": request.old, "userInfo": request.user,
        });
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
    /// The policy about annotations.
    pub(crate) fn read() -> Self {
        Self::of(ANNOTATIONS)
    }

    /// The policy in a file of `manifests`.
    pub(crate) fn of(file: &str) -> Self {
        let objects = yaml::objects(file);
        let spec = &objects[0]["spec"];
        let compile = |text: &Value| {
            let text = text.as_str().expect("an expression");
            Program::compile(text).unwrap_or_else(|error| panic!("{text}\n{error}"))
        };
        let conditions = spec["matchConditions"].as_array();
        Self {
            conditions: conditions
                .into_iter()
                .flatten()
                .map(|condition| compile(&condition["expression"]))
                .collect(),
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
                .map(|program| RefCell::new(Plugin::start(&program, file))),
        }
    }

    /// The reason why the object is rejected, if it is. Kubernetes' own plugin must agree, if there is one.
    pub(crate) fn judge(&self, object: &Value, old: &Value) -> Option<String> {
        self.judge_from(&json!({"username": "somebody"}), object, old)
    }

    /// The same for an object that this account sends.
    pub(crate) fn judge_from(&self, user: &Value, object: &Value, old: &Value) -> Option<String> {
        let request = Request { object, old, user };
        let rejected = self.evaluate(&request);
        if let Some(plugin) = &self.plugin {
            let theirs = plugin.borrow_mut().ask(&request);
            assert_eq!(rejected, theirs, "here and in Kubernetes: {user} {object}");
        }
        rejected
    }

    /// The API server evaluates a variable when an expression uses it; this evaluates all of them in order.
    fn evaluate(&self, request: &Request<'_>) -> Option<String> {
        let mut context = Context::default();
        context.add_function("findAll", find_all).expect("findAll");
        context.add_function("find", find).expect("find");
        for (name, value) in [
            ("object", request.object),
            ("oldObject", request.old),
            ("request", &json!({"userInfo": request.user})),
        ] {
            context.add_variable(name, value).expect(name);
        }
        for condition in &self.conditions {
            match condition.execute(&context) {
                Ok(Cel::Bool(true)) => {}
                Ok(Cel::Bool(false)) => return None,
                other => panic!("no condition: {other:?}"),
            }
        }
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
