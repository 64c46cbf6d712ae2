//! The alerts of the component `monitoring`.

use std::collections::BTreeSet;

use egress_tests::yaml;
use serde_json::Value;

use super::list;

#[test]
fn alerts_use_existing_metrics_and_are_documented() {
    let metrics = include_str!("../../../../docs/metrics.md");
    let operations = include_str!("../../../../docs/operations.md");
    let [object] = &yaml::objects("components/monitoring/rules.yaml")[..] else {
        panic!("not one object");
    };
    let mut alerts = 0;
    for rule in list(&object["spec"]["groups"][0]["rules"]) {
        let text = |value: &Value| value.as_str().expect("a text").to_owned();
        let alert = text(&rule["alert"]);
        let row = operations
            .lines()
            .find(|line| line.starts_with(&format!("| `{alert}` |")))
            .unwrap_or_else(|| panic!("docs/operations.md has no {alert}"));
        for name in metric_names(&text(&rule["expr"])) {
            assert!(
                row.contains(&name),
                "{alert}: docs/operations.md without {name}"
            );
            // A histogram's series: `_bucket` belongs to the family.
            let family = name.strip_suffix("_bucket").unwrap_or(&name);
            assert!(
                metrics.contains(&format!("`{family}`")),
                "{alert}: docs/metrics.md has no {family}"
            );
        }
        for key in ["summary", "description"] {
            assert!(!text(&rule["annotations"][key]).is_empty(), "{alert}");
        }
        alerts += 1;
    }
    let documented = operations
        .lines()
        .filter(|line| line.starts_with("| `EgressAgent"))
        .count();
    assert_eq!(documented, alerts, "alerts in docs/operations.md");
}

fn metric_names(expression: &str) -> BTreeSet<String> {
    expression
        .split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'))
        .filter(|word| word.starts_with("egress_agent_"))
        .map(str::to_owned)
        .collect()
}
