//! No text of a policy makes the agent panic, and one that cannot be read has a reason with a place.
#![no_main]

use std::{collections::BTreeMap, sync::Arc};

use egress_dns::Name;
use egress_policy::{
    Annotations, Inputs, InternalAnswers, Mode, PodAnnotations, Prefix, Problem, Settings,
    Translators, compile,
    objects::{
        NamespacePolicy, ObjectKind, ObjectName, Objects, Tier, TierAction, TierPolicy, TierRule,
    },
};
use libfuzzer_sys::fuzz_target;

fn settings(pod_annotations: PodAnnotations) -> Settings {
    Settings {
        default_mode: Mode::Off,
        pod_annotations,
        cluster_domain: Name::from_labels([b"cluster".as_slice(), b"local"]).expect("a name"),
        guard: true,
        allow_internal: true,
        internal_answers: Arc::new(InternalAnswers::Names(Vec::new())),
        protected: ["169.254.0.0/16", "127.0.0.0/8"]
            .map(|text| Prefix::parse(text).expect("a prefix"))
            .into(),
        translators: Translators::well_known(),
    }
}

fn name(kind: ObjectKind) -> Arc<ObjectName> {
    Arc::new(ObjectName {
        kind,
        namespace: None,
        name: "fuzzed".to_owned(),
    })
}

fn items(text: &str) -> Vec<String> {
    text.split(' ').map(str::to_owned).collect()
}

// The lists are separated by zero bytes.
fuzz_target!(|text: &[u8]| {
    let text = String::from_utf8_lossy(text);
    let mut parts = text.split('\0');
    let mut next = || parts.next();
    let list = |text: Option<&str>| text.map(str::to_owned);
    let pod = Annotations {
        allow: list(next()),
        deny: list(next()),
        resolve: list(next()),
        ..Annotations::default()
    };
    let namespace = Annotations {
        allow: list(next()),
        deny: list(next()),
        ..Annotations::default()
    };
    let policy = next().map(|text| {
        Arc::new(NamespacePolicy {
            name: name(ObjectKind::EgressPolicy),
            mode: None,
            allow: Some(items(text)),
            deny: None,
            resolve: None,
        })
    });
    let rule = next().map(|text| {
        let actions = [TierAction::Pass, TierAction::Deny, TierAction::Allow];
        let rules = actions
            .into_iter()
            .enumerate()
            .map(|(index, action)| TierRule {
                name: None,
                index,
                action,
                entries: items(text),
            });
        Arc::new(TierPolicy {
            name: name(ObjectKind::ClusterEgressPolicy),
            tier: Tier::Admin,
            priority: 1,
            rules: rules.collect(),
        })
    });
    let set = next().map(|text| ("s".to_owned(), items(text)));
    let objects = Objects {
        namespace: policy.into_iter().collect(),
        tiers: rule.into_iter().collect(),
        sets: Arc::new(set.into_iter().collect::<BTreeMap<_, _>>()),
    };
    let inputs = Inputs {
        pod: &pod,
        namespace: &namespace,
        objects: &objects,
    };
    for pod_annotations in [PodAnnotations::Grant, PodAnnotations::Narrow] {
        let Err(error) = compile(inputs, &settings(pod_annotations)) else {
            continue;
        };
        assert!(!error.problems().is_empty());
        assert!(!error.problems().contains(&Problem::Internal));
        assert!(!error.to_string().contains('\n'));
    }
});
