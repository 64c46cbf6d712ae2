//! A description as lines for people.

use std::fmt::Write as _;

use crate::{
    Mode,
    closed::listed,
    describe::{DescribedRule, Description},
    explain::List,
    objects::Tier,
};

impl Description {
    /// The description under a heading, such as `namespace/pod`. Every line ends with a newline.
    pub fn text(&self, title: &str) -> String {
        let mut lines = Lines(format!("{title}\n"));
        if self.says_nothing() {
            lines.push(
                1,
                &format!(
                    "mode: off (no packet is judged: everything may be reached); from: {}",
                    self.mode_by
                ),
            );
        } else {
            lines.body(self);
        }
        for warning in &self.warnings {
            lines.push(1, &format!("warning: {warning}"));
        }
        lines.0
    }

    /// The description in one line, without its heading.
    pub fn summary(&self) -> String {
        if self.says_nothing() {
            return format!("off, from {}", self.mode_by);
        }
        let count = |list: List, what: &str| {
            let rules = self.rules.iter();
            match rules.filter(|rule| rule.list == list).count() {
                0 => String::new(),
                count => format!(", {count} {what}"),
            }
        };
        let closed = if self.open {
            "open".to_owned()
        } else {
            format!("closed by {}", listed(&self.closed_by))
        };
        let warnings = match self.warnings.len() {
            0 => String::new(),
            1 => ", 1 warning".to_owned(),
            count => format!(", {count} warnings"),
        };
        format!(
            "{}, {closed}{}{}{}{}{warnings}",
            self.mode.as_str(),
            count(List::Allow, "allowed"),
            count(List::Deny, "denied"),
            count(List::Pass, "passed on"),
            count(List::Resolve, "only resolved"),
        )
    }
}

/// The text under construction.
struct Lines(String);

impl Lines {
    fn push(&mut self, depth: usize, line: &str) {
        for _ in 0..depth {
            self.0.push_str("  ");
        }
        self.0.push_str(line.trim_end());
        self.0.push('\n');
    }

    fn body(&mut self, of: &Description) {
        let meaning = match of.mode {
            Mode::Enforce => "denied packets are dropped",
            Mode::Audit => "denials are reported, and no packet is dropped",
            Mode::Off => "no packet is judged; the lists take effect in another mode",
        };
        self.push(
            1,
            &format!(
                "mode: {} ({meaning}); from: {}",
                of.mode.as_str(),
                of.mode_by
            ),
        );
        let of_tier = |tier: Tier| -> Vec<&DescribedRule> {
            let rules = of.rules.iter();
            rules.filter(|rule| rule.tier == Some(tier)).collect()
        };
        let of_list = |list: List| -> Vec<&DescribedRule> {
            let rules = of.rules.iter();
            rules
                .filter(|rule| rule.tier.is_none() && rule.list == list)
                .collect()
        };
        let baseline = of_tier(Tier::Baseline);
        self.rules("first, in this order:", &of_tier(Tier::Admin));
        self.rules("may not reach:", &of_list(List::Deny));
        let allow = of_list(List::Allow);
        self.rules("may reach:", &allow);
        if !of.open && allow.is_empty() {
            self.push(1, "may reach: no external destination");
        }
        if of.baseline_for_internal {
            self.rest(of);
            self.rules("then, for internal destinations, in this order:", &baseline);
        } else {
            self.rules("then, in this order:", &baseline);
            self.rest(of);
        }
        if !of.open {
            self.push(
                1,
                if of.reaches_internal {
                    "may reach internal destinations (ranges.internal), unless denied"
                } else {
                    "may reach internal destinations only where listed (ranges.allowInternal: false)"
                },
            );
        }
        self.rules("may also query:", &of_list(List::Resolve));
        for note in &of.notes {
            self.push(1, note);
        }
    }

    /// How external destinations are treated that no rule matches.
    fn rest(&mut self, of: &Description) {
        if of.open {
            self.push(
                1,
                "open: everything else may be reached, except protected addresses",
            );
        } else {
            self.push(
                1,
                &format!(
                    "closed by {}: everything else that is external is denied",
                    listed(&of.closed_by)
                ),
            );
        }
    }

    /// The rules under a heading, in columns.
    fn rules(&mut self, heading: &str, rules: &[&DescribedRule]) {
        if rules.is_empty() {
            return;
        }
        self.push(1, heading);
        let width = |of: fn(&DescribedRule) -> &str| {
            let rules = rules.iter();
            rules
                .map(|rule| of(rule).chars().count())
                .max()
                .unwrap_or(0)
        };
        let [destinations, packets] =
            [width(|rule| &rule.destination), width(|rule| &rule.packets)];
        for rule in rules {
            let mut line = String::new();
            if rule.tier.is_some() {
                let _ = write!(line, "{:5} ", rule.list.as_str());
            }
            let _ = write!(line, "{:destinations$}", rule.destination);
            if packets > 0 {
                let _ = write!(line, "  {:packets$}", rule.packets);
            }
            let _ = write!(line, "  ({})", rule.origin);
            self.push(2, &line);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        Annotations, Inputs, PolicyError, Settings,
        describe::describe as description,
        objects::{ObjectKind, ObjectName, Objects, TierAction, TierPolicy, TierRule},
        reference::settings,
    };

    fn describe(title: &str, inputs: Inputs<'_>, of: &Settings) -> Result<String, PolicyError> {
        description(inputs, of).map(|description| description.text(title))
    }

    #[test]
    fn the_description_lists_destinations_with_their_origin() {
        let pod = Annotations {
            allow: Some("github.com:443, *.example.com\n10.20.0.0/16:5432/tcp".to_owned()),
            deny: Some("gist.github.com".to_owned()),
            ..Annotations::default()
        };
        let namespace = Annotations {
            allow: Some("[2001:db8::7]:8000-8100/udp 192.0.2.1/icmp".to_owned()),
            resolve: Some("db.example.net".to_owned()),
            ..Annotations::default()
        };
        let text = describe(
            "shop/cart",
            Inputs::annotations(&pod, &namespace),
            &settings(),
        )
        .unwrap();
        assert_eq!(
            text,
            "\
shop/cart
  mode: enforce (denied packets are dropped); from: lists of namespace and pod
  may not reach:
    gist.github.com  queries are refused  (pod)
  may reach:
    10.20.0.0/16   tcp port 5432           (pod)
    192.0.2.1      icmp                    (namespace)
    2001:db8::7    udp ports 8000-8100     (namespace)
    github.com     tcp and udp port 443    (pod)
    *.example.com  tcp, udp and icmp echo  (pod)
  closed by namespace and pod: everything else that is external is denied
  may reach internal destinations (ranges.internal), unless denied
  may also query:
    db.example.net  (namespace)
  names in cluster.local may always be queried, unless denied
  DNS servers other than resolvers only with an entry that names the address
"
        );
    }

    #[test]
    fn the_description_excludes_protected_addresses_from_anywhere() {
        let pod = |allow: &str| Annotations {
            allow: Some(allow.to_owned()),
            ..Annotations::default()
        };
        let text = |allow| {
            describe(
                "a/b",
                Inputs::annotations(&pod(allow), &Annotations::default()),
                &settings(),
            )
            .unwrap()
        };
        let note = "  protected addresses only with an entry that names the address\n";
        assert!(text("*:443").contains(note));
        assert!(!text("a.com:443").contains(note));
        assert!(text("0.0.0.0/0").contains("  warning: the pod's allow entry `0.0.0.0/0` opens"));
    }

    #[test]
    fn the_description_says_when_every_name_may_be_queried() {
        let text = |allow: Option<&str>, deny: Option<&str>| {
            let pod = Annotations {
                allow: allow.map(str::to_owned),
                deny: deny.map(str::to_owned),
                ..Annotations::default()
            };
            describe(
                "a/b",
                Inputs::annotations(&pod, &Annotations::default()),
                &settings(),
            )
            .unwrap()
        };
        let every = "  every name may be queried, unless denied\n";
        assert!(text(Some("*:443"), None).contains(every));
        assert!(text(None, Some("10.0.0.0/8")).contains(every));
        assert!(!text(Some("a.com"), None).contains(every));
        assert!(!text(None, Some("*")).contains(every));
    }

    #[test]
    fn a_pod_without_a_policy_may_reach_everything() {
        let nothing = Annotations::default();
        assert_eq!(
            describe("a/b", Inputs::annotations(&nothing, &nothing), &settings()).unwrap(),
            "a/b\n  mode: off (no packet is judged: everything may be reached); from: defaultMode\n"
        );
    }

    #[test]
    fn a_pod_without_lists_in_enforce_mode_may_reach_nothing_external() {
        let pod = Annotations {
            mode: Some("enforce".to_owned()),
            ..Annotations::default()
        };
        let text = describe(
            "a/b",
            Inputs::annotations(&pod, &Annotations::default()),
            &settings(),
        )
        .unwrap();
        assert!(
            text.contains("  may reach: no external destination\n"),
            "{text}"
        );
    }

    #[test]
    fn ordered_rules_come_in_the_order_of_evaluation() {
        let pod = Annotations {
            allow: Some("192.0.2.1:443/tcp".to_owned()),
            ..Annotations::default()
        };
        let policy = |name: &str, tier, action, entry: &str| {
            Arc::new(TierPolicy {
                name: Arc::new(ObjectName {
                    kind: ObjectKind::ClusterEgressPolicy,
                    namespace: None,
                    name: name.to_owned(),
                }),
                tier,
                priority: 1,
                rules: vec![TierRule {
                    name: Some("mail".to_owned()),
                    index: 0,
                    action,
                    entries: vec![entry.to_owned()],
                }],
            })
        };
        let objects = Objects {
            tiers: vec![
                policy("base", Tier::Baseline, TierAction::Deny, "198.51.100.0/24"),
                policy("guard", Tier::Admin, TierAction::Deny, "*:25/tcp"),
            ],
            ..Objects::default()
        };
        let none = Annotations::default();
        let inputs = |pod| Inputs {
            pod,
            namespace: &none,
            objects: &objects,
        };
        assert_eq!(
            describe("a/b", inputs(&pod), &settings()).unwrap(),
            "\
a/b
  mode: enforce (denied packets are dropped); from: lists of pod
  first, in this order:
    deny  * (anywhere)  tcp port 25  (ClusterEgressPolicy guard, rule 1 `mail`)
  may reach:
    192.0.2.1  tcp port 443  (pod)
  closed by pod: everything else that is external is denied
  then, for internal destinations, in this order:
    deny  198.51.100.0/24  every protocol  (ClusterEgressPolicy base, rule 1 `mail`)
  may reach internal destinations (ranges.internal), unless denied
  names in cluster.local may always be queried, unless denied
  DNS servers other than resolvers only with an entry that names the address
"
        );
        let text = describe("a/b", inputs(&none), &settings()).unwrap();
        let open = "then, in this order:
    deny  198.51.100.0/24  every protocol  (ClusterEgressPolicy base, rule 1 `mail`)
  open: everything else may be reached, except protected addresses
";
        assert!(text.contains("; from: ordered rules\n"), "{text}");
        assert!(text.contains(open), "{text}");
        let summary = description(inputs(&pod), &settings()).unwrap().summary();
        assert_eq!(summary, "enforce, closed by pod, 1 allowed, 2 denied");
    }
}
