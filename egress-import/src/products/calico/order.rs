//! The order of policies in all tiers.

use std::collections::BTreeMap;

use crate::products::{LAST_PRIORITY, Numbered, ranks};

/// The first priority number that is used, so that there is room in front.
const FIRST: u32 = 10;

/// A policy and its place.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub(super) index: usize,
    pub(super) tier: String,
    pub(super) order: f64,
    pub(super) name: String,
    /// Whether it has rules that deny or pass.
    pub(super) decides: bool,
    /// Whether its last rule passes everything.
    pub(super) passes_on: bool,
}

/// Priority numbers of one policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Numbers {
    pub(super) own: u32,
    /// The number of the rule that denies the rest, if that rule is needed before the next tier.
    pub(super) end_of_tier: Option<u32>,
    pub(super) is_last_of_tier: bool,
    pub(super) is_last_tier: bool,
}

/// The order of all policies.
#[derive(Debug)]
pub(super) struct Order {
    matters: bool,
    numbers: Result<BTreeMap<usize, Numbers>, String>,
}

impl Order {
    pub(super) fn of(manifests: &[Numbered<'_>], places: impl Iterator<Item = Place>) -> Self {
        let mut places: Vec<Place> = places.collect();
        let mut tiers: Vec<String> = places.iter().map(|place| place.tier.clone()).collect();
        tiers.sort();
        tiers.dedup();
        let matters = tiers.len() > 1 || places.iter().any(|place| place.decides);
        let numbers = sorted(manifests, tiers).and_then(|tiers| {
            places.sort_by(|a, b| a.order.total_cmp(&b.order).then(a.name.cmp(&b.name)));
            number(&places, &tiers)
        });
        Self { matters, numbers }
    }

    /// Whether the order of policies can change what is allowed.
    pub(super) const fn matters(&self) -> bool {
        self.matters
    }

    /// The numbers of a policy.
    pub(super) fn numbers(&self, index: usize) -> Result<Numbers, String> {
        self.numbers
            .as_ref()
            .map_err(Clone::clone)?
            .get(&index)
            .cloned()
            .ok_or_else(|| "it has no place among the policies".to_owned())
    }
}

/// The tiers by their order.
fn sorted(manifests: &[Numbered<'_>], tiers: Vec<String>) -> Result<Vec<String>, String> {
    if tiers.len() < 2 {
        return Ok(tiers);
    }
    let mut orders = Vec::new();
    for tier in tiers {
        let own = manifests
            .iter()
            .find(|(_, manifest)| manifest.kind == "Tier" && manifest.name == tier);
        let order = match own {
            Some((_, manifest)) => manifest.spec()?.number("order")?.unwrap_or(f64::INFINITY),
            // The order that Calico gives it.
            None if tier == "default" => 1_000_000.0,
            None => {
                return Err(format!(
                    "there are several tiers, and the Tier `{tier}` is not among the files, so their order is not \
                     known"
                ));
            }
        };
        orders.push((order, tier));
    }
    orders.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    Ok(orders.into_iter().map(|(_, tier)| tier).collect())
}

fn number(places: &[Place], tiers: &[String]) -> Result<BTreeMap<usize, Numbers>, String> {
    // A slot for each policy, and one for the end of each tier.
    let slots: Vec<usize> = (0..places.len() + tiers.len()).collect();
    let mut free = ranks(&slots, FIRST, LAST_PRIORITY)?.into_iter();
    let mut next = || free.next().unwrap_or(LAST_PRIORITY);
    let mut numbers = BTreeMap::new();
    for (t, tier) in tiers.iter().enumerate() {
        let is_last_tier = t + 1 == tiers.len();
        let of_tier: Vec<&Place> = places.iter().filter(|place| place.tier == *tier).collect();
        let own: Vec<u32> = of_tier.iter().map(|_| next()).collect();
        let end = next();
        for (p, (place, own)) in of_tier.iter().zip(own).enumerate() {
            let is_last_of_tier = p + 1 == of_tier.len();
            let goes_on = is_last_of_tier && place.passes_on;
            numbers.insert(
                place.index,
                Numbers {
                    own,
                    end_of_tier: (!is_last_tier && !goes_on).then_some(end),
                    is_last_of_tier,
                    is_last_tier,
                },
            );
        }
    }
    Ok(numbers)
}
