//! Describes a policy in words, for `egress-agent check`.

use egress_common::records::POLICY_SPEAKS_OF_NAMES;

use super::{
    Compiled, Inputs, Mode, PolicyError, Settings, compile,
    effective::{self, Effective, Rule},
    entry::{Destination, class_words},
    objects::TierAction,
    tiers::Run,
};

/// The destinations that a pod may reach, each with the origin of its annotation. Every line ends with a
/// newline.
///
/// `title` is the heading for the pod, `namespace/pod`.
///
/// # Errors
///
/// As [`compile()`].
pub fn describe(
    title: &str,
    inputs: Inputs<'_>,
    settings: &Settings,
) -> Result<String, PolicyError> {
    // Exceeding a limit of the compiled form is an error here too.
    let compiled = compile(inputs, settings)?;
    let mut effective = effective::resolve(inputs, settings)?;
    effective.warnings.clone_from(&compiled.warnings);
    Ok(Lines::of(title, &effective, settings, &compiled))
}

/// The text under construction.
struct Lines(String);

impl Lines {
    fn of(title: &str, effective: &Effective, settings: &Settings, compiled: &Compiled) -> String {
        let Effective {
            mode,
            open,
            tiers,
            allow,
            deny,
            resolve,
            warnings,
            ..
        } = effective;
        let mut lines = Self(String::new());
        lines.push(0, title);
        let says_nothing =
            allow.is_empty() && deny.is_empty() && resolve.is_empty() && tiers.is_empty();
        if *mode == Mode::Off && says_nothing {
            lines.push(
                1,
                "mode: off (no packet is judged: everything may be reached)",
            );
            lines.warnings(warnings);
            return lines.0;
        }
        lines.push(
            1,
            match mode {
                Mode::Enforce => "mode: enforce (denied packets are dropped)",
                Mode::Audit => "mode: audit (denials are reported, and no packet is dropped)",
                Mode::Off => {
                    "mode: off (no packet is judged; the lists take effect in another mode)"
                }
            },
        );
        lines.ordered("first, in this order:", &tiers.admin);
        lines.push(
            1,
            if *open {
                "open: everything may be reached, except protected addresses and what is denied below"
            } else {
                "closed: everything external is denied, except what is listed below"
            },
        );
        lines.rules("may reach:", allow, |rule| class_words(&rule.class));
        if !open {
            if allow.is_empty() {
                lines.push(1, "may reach: no external destination");
            }
            lines.push(1, if settings.allow_internal {
                "may reach internal destinations (ranges.internal), unless denied"
            } else {
                "may reach internal destinations only where listed (ranges.allowInternal: false)"
            });
        }
        if allow
            .iter()
            .any(|rule| rule.destination == Destination::Any)
        {
            lines.push(
                1,
                "protected addresses only with an entry that names the address",
            );
        }
        lines.rules("may not reach:", deny, |rule| match rule.destination {
            Destination::Names(_) => "queries are refused".to_owned(),
            Destination::Any | Destination::Addresses(_) => class_words(&rule.class),
        });
        lines.rules("may also query:", resolve, |_| String::new());
        lines.ordered(
            if effective.selected {
                "then, for internal destinations, in this order:"
            } else {
                "then, in this order:"
            },
            &tiers.baseline,
        );
        if compiled.names.allows_unlisted() {
            lines.push(1, "every name may be queried, unless denied");
        } else {
            lines.push(
                1,
                &format!(
                    "names in {} may always be queried, unless denied",
                    settings.cluster_domain
                ),
            );
        }
        if compiled.record.flags & POLICY_SPEAKS_OF_NAMES != 0 {
            lines.push(
                1,
                "DNS servers other than resolvers only with an entry that names the address",
            );
        }
        lines.warnings(warnings);
        lines.0
    }

    fn warnings(&mut self, warnings: &[String]) {
        for warning in warnings {
            self.push(1, &format!("warning: {warning}"));
        }
    }

    fn push(&mut self, depth: usize, line: &str) {
        for _ in 0..depth {
            self.0.push_str("  ");
        }
        self.0.push_str(line);
        self.0.push('\n');
    }

    /// The rules of a tier under a heading, in the order of evaluation.
    fn ordered(&mut self, heading: &str, runs: &[Run]) {
        if runs.is_empty() {
            return;
        }
        self.push(1, heading);
        for run in runs {
            let action = match run.effect.action {
                TierAction::Allow => "allow",
                TierAction::Deny => "deny ",
                TierAction::Pass => "pass ",
            };
            for rule in &run.rules {
                let destination = destination_words(&rule.destination);
                let (packets, origin) = (class_words(&rule.class), &rule.origin);
                self.push(2, &format!("{action} {destination}  {packets}  ({origin})"));
            }
        }
    }

    /// The rules under a heading in columns, each with the text from `words` and its origin.
    fn rules(&mut self, heading: &str, rules: &[Rule], words: fn(&Rule) -> String) {
        if rules.is_empty() {
            return;
        }
        self.push(1, heading);
        let mut rules: Vec<&Rule> = rules.iter().collect();
        rules.sort_by(|rule, other| {
            (&rule.destination, rule.class, &rule.origin).cmp(&(
                &other.destination,
                other.class,
                &other.origin,
            ))
        });
        let rows: Vec<[String; 2]> = rules
            .iter()
            .map(|rule| [destination_words(&rule.destination), words(rule)])
            .collect();
        let [first, second] = [0, 1].map(|column| {
            rows.iter()
                .map(|row| row[column].chars().count())
                .max()
                .unwrap_or(0)
        });
        for ([destination, packets], rule) in rows.iter().zip(rules) {
            let gap = if second > 0 { "  " } else { "" };
            let origin = &rule.origin;
            self.push(
                2,
                &format!("{destination:first$}{gap}{packets:second$}  ({origin})"),
            );
        }
    }
}

fn destination_words(destination: &Destination) -> String {
    match destination {
        Destination::Any => "* (anywhere)".to_owned(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Annotations, reference::settings};

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
  mode: enforce (denied packets are dropped)
  closed: everything external is denied, except what is listed below
  may reach:
    10.20.0.0/16   tcp port 5432           (pod)
    192.0.2.1      icmp                    (namespace)
    2001:db8::7    udp ports 8000-8100     (namespace)
    github.com     tcp and udp port 443    (pod)
    *.example.com  tcp, udp and icmp echo  (pod)
  may reach internal destinations (ranges.internal), unless denied
  may not reach:
    gist.github.com  queries are refused  (pod)
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
            "a/b\n  mode: off (no packet is judged: everything may be reached)\n"
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
}
