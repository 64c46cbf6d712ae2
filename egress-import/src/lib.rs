//! Reads network policies of other products and writes policy objects of this one.
//!
//! 1. `manifest`: the documents of the files;
//! 2. `products/`: the kinds of each product, as rules in one form (`rule`);
//! 3. `translate`, `names`, `cidr`: a rule as entries. A permission without a counterpart is left out, a
//!    denial is refused;
//! 4. `object`, `output`: objects as YAML, with a comment for each difference in meaning.
//!
//! All functions are pure. Nothing here knows an operating system.

mod check;
mod cidr;
mod fields;
mod manifest;
mod names;
mod object;
mod output;
mod products;
mod remark;
mod rule;
mod selector;
mod translate;

pub use remark::Severity;

/// A file.
#[derive(Clone, Debug)]
pub struct Input {
    /// Its path, for messages. The path of a rule file says what the rule is.
    pub name: String,
    /// Its text.
    pub text: String,
}

/// The caller's options.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Write a wildcard that stands for exactly one label in the original as one that stands for one or more.
    pub deep_wildcards: bool,
    /// The namespace of objects without one.
    pub namespace: Option<String>,
}

/// The result of an import.
#[derive(Clone, Debug, Default)]
pub struct Imported {
    /// The objects, as YAML with comments.
    pub yaml: String,
    /// How many objects there are.
    pub objects: usize,
    /// Rules that were left out or refused.
    pub findings: Vec<Finding>,
    /// Files and objects that could not be read.
    pub problems: Vec<Problem>,
}

/// Something that was left out or refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// File and line of the original object.
    pub origin: String,
    /// Kind, namespace and name of the original object.
    pub source: String,
    /// Whether it was left out or refused.
    pub severity: Severity,
    /// The part that was left out or refused, and why.
    pub text: String,
}

/// Something that could not be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// File, and line if there is one.
    pub origin: String,
    /// The mistake.
    pub message: String,
}

/// Reads files and writes objects.
pub fn import(inputs: &[Input], options: &Options) -> Imported {
    let mut problems = Vec::new();
    let mut manifests = Vec::new();
    let mut rule_files = Vec::new();
    for input in inputs {
        if products::rule_files::is_rule_file(&input.name) {
            rule_files.push(input);
        } else {
            manifests.extend(manifest::read(&input.name, &input.text, &mut problems));
        }
    }
    let mut documents = products::import(&manifests, options);
    documents.extend(products::rule_files::import(&rule_files, options));
    products::make_names_unique(&mut documents);
    let yaml = output::write(&documents);
    for error in check::errors(&yaml) {
        problems.push(Problem {
            origin: "output".to_owned(),
            message: error,
        });
    }
    let findings = documents
        .iter()
        .flat_map(|document| {
            let of_objects = document
                .objects
                .iter()
                .flat_map(object::Object::all_remarks);
            document
                .remarks
                .iter()
                .chain(of_objects)
                .filter(|remark| remark.severity != Severity::Note)
                .map(|remark| Finding {
                    origin: document.origin.clone(),
                    source: document.source.clone(),
                    severity: remark.severity,
                    text: remark.text.clone(),
                })
        })
        .collect();
    Imported {
        objects: documents
            .iter()
            .map(|document| document.objects.len())
            .sum(),
        yaml,
        findings,
        problems,
    }
}
