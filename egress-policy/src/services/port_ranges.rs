//! Few ranges for many ports.

use std::collections::BTreeSet;

/// At most so many ranges (but one) that contain these ports. They contain few of the `others`, and then few ports besides.
/// Without need they contain no other port at all.
pub(super) fn port_ranges(
    ports: &BTreeSet<u16>,
    most: usize,
    others: &BTreeSet<u16>,
) -> Vec<(u16, u16)> {
    let Some((&first, &last)) = ports.first().zip(ports.last()) else {
        return Vec::new();
    };
    // The ranges are separated where that keeps most out.
    let neighbours = ports.iter().zip(ports.iter().skip(1));
    let mut gaps: Vec<_> = neighbours
        .filter(|(before, after)| *after - *before > 1)
        .map(|(&before, &after)| {
            let others = others.range(before..after).filter(|port| **port != before);
            ((others.count(), after - before), (before, after))
        })
        .collect();
    gaps.sort_unstable_by(|a, b| b.cmp(a));
    gaps.truncate(most.max(1) - 1);
    let mut kept: Vec<(u16, u16)> = gaps.into_iter().map(|(_, gap)| gap).collect();
    kept.sort_unstable();
    let begins = std::iter::once(first).chain(kept.iter().map(|(_, after)| *after));
    let ends = kept.iter().map(|(before, _)| *before).chain([last]);
    begins.zip(ends).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn ranges_contain_all_ports_and_are_not_more_than_asked(
            ports in proptest::collection::btree_set(any::<u16>(), 0..200),
            others in proptest::collection::btree_set(any::<u16>(), 0..200),
            most in 1_usize..200,
        ) {
            let ranges = port_ranges(&ports, most, &others);
            prop_assert!(ranges.len() <= most);
            for port in &ports {
                let containing = ranges.iter().filter(|(min, max)| (min..=max).contains(&port));
                prop_assert_eq!(containing.count(), 1);
            }
            if ports.len() <= most {
                let size: usize = ranges.iter().map(|(min, max)| usize::from(max - min) + 1).sum();
                prop_assert_eq!(size, ports.len());
            }
        }
    }

    #[test]
    fn unused_ports_are_taken_before_those_of_others() {
        let ports = BTreeSet::from([1, 4, 100, 200]);
        assert_eq!(
            port_ranges(&ports, 2, &BTreeSet::from([2])),
            [(1, 1), (4, 200)]
        );
        assert_eq!(
            port_ranges(&ports, 2, &BTreeSet::new()),
            [(1, 100), (200, 200)]
        );
    }
}
