//! Reading pods' annotations and policy objects, and remembering the last policy that could be read.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use crate::{control::digest, pods::Pod, report::Subject, serve::Written};
use egress_policy::{Annotations, Compiled, Inputs, Mode, Objects, Settings};

/// The policy of one pod, and what it was read from.
struct Reading {
    uid: String,
    own: BTreeMap<String, String>,
    namespace: BTreeMap<String, String>,
    objects: Objects,
    /// The sets, if an entry uses one: then a change of the sets may change the policy.
    sets: Option<Arc<BTreeMap<String, Vec<String>>>>,
    compiled: Arc<Compiled>,
    /// Whether `compiled` was read from annotations and objects of this pod, now or earlier.
    good: bool,
    problem: Option<String>,
    /// What `compiled` was read from.
    written: Arc<Written>,
    /// Whether the pod's annotations or objects cannot be read now.
    unreadable: bool,
    /// Whether `compiled` was compiled with the present settings.
    current: bool,
}

impl Reading {
    /// Whether it was read from what the pod has now.
    fn is_of(&self, pod: &Pod) -> bool {
        self.current
            && self.own == pod.annotations
            && self.namespace == pod.namespace_annotations
            && self.objects.namespace == pod.objects.namespace
            && self.objects.tiers == pod.objects.tiers
            && self
                .sets
                .as_ref()
                .is_none_or(|sets| *sets == pod.objects.sets)
    }
}

/// The policies of all pods.
pub(in crate::control) struct Policies {
    settings: Settings,
    pods: HashMap<Subject, Reading>,
}

impl Policies {
    pub(in crate::control) fn new(settings: Settings) -> Self {
        Self {
            settings,
            pods: HashMap::new(),
        }
    }

    /// The pod's policy, as its annotations and objects say; if they cannot be read, the last one that could be read; without
    /// one, a closed policy.
    pub(in crate::control) fn read(&mut self, key: &Subject, pod: &Pod) -> Arc<Compiled> {
        let before = self.pods.get(key).filter(|reading| reading.uid == pod.uid);
        if let Some(reading) = before
            && reading.is_of(pod)
        {
            return Arc::clone(&reading.compiled);
        }
        let own = Annotations::from_map(&pod.annotations);
        let namespace = Annotations::from_map(&pod.namespace_annotations);
        let inputs = Inputs {
            pod: &own,
            namespace: &namespace,
            objects: &pod.objects,
        };
        let sets = inputs.use_sets().then(|| Arc::clone(&pod.objects.sets));
        let read = egress_policy::compile(inputs, &self.settings);
        let unreadable = read.is_err();
        let (compiled, good, problem, written) = match read {
            Ok(mut compiled) => {
                compiled.record.annotations = digest::of_pod(pod);
                let problem = (!compiled.warnings.is_empty()).then(|| compiled.warnings.join("; "));
                let written = Arc::new(Written {
                    own,
                    namespace,
                    objects: pod.objects.clone(),
                });
                (Arc::new(compiled), true, problem, written)
            }
            Err(error) => {
                let last = before.filter(|reading| reading.good);
                if let Some((compiled, written)) = last.and_then(|last| self.again(last)) {
                    let problem = format!("{error}; the last good policy stays");
                    (compiled, true, Some(problem), written)
                } else {
                    let closed = egress_policy::unreadable(&own, &namespace, &self.settings);
                    let follows = match closed.mode {
                        Mode::Enforce => "everything external is denied",
                        Mode::Audit | Mode::Off => {
                            "everything external would be denied; nothing is stopped \
                             (defaultMode: audit)"
                        }
                    };
                    let problem = format!("{error}; {follows}");
                    (Arc::new(closed), false, Some(problem), Arc::default())
                }
            }
        };
        let reading = Reading {
            uid: pod.uid.clone(),
            own: pod.annotations.clone(),
            namespace: pod.namespace_annotations.clone(),
            objects: pod.objects.clone(),
            sets,
            compiled: Arc::clone(&compiled),
            good,
            problem,
            written,
            unreadable,
            current: true,
        };
        self.pods.insert(key.clone(), reading);
        compiled
    }

    /// Compiles with other settings from now on.
    pub(in crate::control) fn change(&mut self, settings: Settings) {
        if settings != self.settings {
            self.settings = settings;
            for reading in self.pods.values_mut() {
                reading.current = false;
            }
        }
    }

    /// The last policy that could be read, compiled with the present settings; `None` if it does not compile with
    /// these.
    fn again(&self, last: &Reading) -> Option<(Arc<Compiled>, Arc<Written>)> {
        let written = Arc::clone(&last.written);
        if last.current {
            return Some((Arc::clone(&last.compiled), written));
        }
        let compiled = egress_policy::compile(written.inputs(), &self.settings);
        let mut compiled = compiled.ok()?;
        compiled.record.annotations = last.compiled.record.annotations;
        Some((Arc::new(compiled), written))
    }

    /// The last reading of a pod: its policy, the annotations that it comes from, and whether the present ones
    /// cannot be read.
    pub(in crate::control) fn last(
        &self,
        key: &Subject,
    ) -> Option<(&Arc<Compiled>, &Arc<Written>, bool)> {
        let reading = self.pods.get(key)?;
        Some((&reading.compiled, &reading.written, reading.unreadable))
    }

    /// The present settings.
    pub(in crate::control) fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The policy of an interface in quarantine.
    pub(in crate::control) fn unidentified(&self) -> Arc<Compiled> {
        Arc::new(egress_policy::unidentified(&self.settings))
    }

    /// The policy of a pod whose namespace is not known yet.
    pub(in crate::control) fn without_namespace(
        &self,
        pod: &Pod,
        quarantine: bool,
    ) -> Arc<Compiled> {
        let own = Annotations::from_map(&pod.annotations);
        let closed = egress_policy::without_namespace(&own, quarantine, &self.settings);
        Arc::new(closed)
    }

    /// The errors or the warnings about the pod's annotations and objects.
    pub(in crate::control) fn problem(&self, key: &Subject) -> Option<String> {
        self.pods.get(key)?.problem.clone()
    }

    /// Forgets pods that are gone.
    pub(super) fn retain(&mut self, is_there: impl Fn(&Subject) -> bool) {
        self.pods.retain(|subject, _| is_there(subject));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{config::Config, control::plan::scene::pod};

    const ALLOW: &str = "egress-agent.dev/allow";

    fn settings(lines: &str) -> Settings {
        let text = format!("dns: {{resolvers: [10.0.0.53]}}\nnode: n1\n{lines}");
        let config = Config::from_yaml(&text).expect("a configuration");
        config.policy_settings()
    }

    fn allowing(list: &str) -> Pod {
        let mut pod = pod("cart");
        pod.annotations.insert(ALLOW.to_owned(), list.to_owned());
        pod
    }

    #[test]
    fn a_pod_keeps_its_last_good_policy_when_its_annotations_cannot_be_read() {
        let cart = Subject::pod("shop", "cart");
        let mut policies = Policies::new(settings(""));
        let good = policies.read(&cart, &allowing("a.test"));
        assert_eq!(policies.problem(&cart), None);
        assert_eq!(policies.read(&cart, &allowing("a.test:x")), good);
        let problem = policies.problem(&cart).expect("a problem");
        assert!(problem.ends_with("the last good policy stays"), "{problem}");
        let other = policies.read(&cart, &allowing("b.test"));
        assert_ne!(other, good);
        assert_eq!(policies.problem(&cart), None);
    }

    #[test]
    fn the_last_good_policy_is_compiled_anew_with_other_settings() {
        let cart = Subject::pod("shop", "cart");
        let mut policies = Policies::new(settings(""));
        let good = policies.read(&cart, &allowing("a.test"));
        policies.read(&cart, &allowing("a.test:x"));
        let others = settings("ranges: {allowInternal: false}\n");
        policies.change(others.clone());
        let again = policies.read(&cart, &allowing("a.test:x"));
        assert_ne!(again, good);
        let mut fresh = Policies::new(others);
        assert_eq!(again, fresh.read(&cart, &allowing("a.test")));
    }

    #[test]
    fn a_new_pod_whose_annotations_cannot_be_read_is_closed() {
        let cart = Subject::pod("shop", "cart");
        let mut policies = Policies::new(settings(""));
        let closed = policies.read(&cart, &allowing("a.test:x"));
        assert_eq!(closed.mode, Mode::Enforce);
        let problem = policies.problem(&cart).expect("a problem");
        assert!(
            problem.ends_with("everything external is denied"),
            "{problem}"
        );
        // Another pod of the same name has no last good policy.
        policies.read(&cart, &allowing("a.test"));
        let mut anew = allowing("a.test:x");
        anew.uid = "another".to_owned();
        assert_eq!(policies.read(&cart, &anew), closed);
    }
}
