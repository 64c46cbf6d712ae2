//! Code that the benchmarks share: an unenforced ("bare") pod beside an enforced one, rounds in alternation,
//! and tables.
//!
//! Machines differ, and so does one machine from minute to minute. So every variant is measured in short
//! rounds that alternate within one run, and each round is compared with the bare round next to it; the
//! absolute numbers are only for orientation.
#![allow(
    dead_code,
    clippy::allow_attributes,
    reason = "each benchmark is a crate of its own and uses a part of this"
)]

pub(crate) mod dns;
pub(crate) mod full_node;
pub(crate) mod objects;
pub(crate) mod plot;
pub(crate) mod responder;

use std::{fs, ops::Range, thread, time::Instant};

use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};

/// The median and the quartiles of a measurement.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spread {
    /// The median.
    pub(crate) middle: f64,
    /// A quarter of the rounds is below it.
    pub(crate) low: f64,
    /// A quarter of the rounds is above it.
    pub(crate) high: f64,
}

impl Spread {
    /// The spread of at least one number.
    pub(crate) fn of(numbers: impl IntoIterator<Item = f64>) -> Self {
        let mut numbers: Vec<f64> = numbers.into_iter().collect();
        numbers.sort_unstable_by(f64::total_cmp);
        Self {
            middle: quantile(&numbers, 0.5),
            low: quantile(&numbers, 0.25),
            high: quantile(&numbers, 0.75),
        }
    }

    /// The spread of the ratios of each number to the bare one of the same round.
    pub(crate) fn of_ratios(numbers: &[f64], bare: &[f64]) -> Self {
        assert_eq!(numbers.len(), bare.len(), "one number for each round");
        Self::of(numbers.iter().zip(bare).map(|(number, bare)| number / bare))
    }

    /// `1.23 (1.20 to 1.31)`
    pub(crate) fn ratio(self) -> String {
        let Self { middle, low, high } = self;
        format!("{middle:.2} ({low:.2} to {high:.2})")
    }

    /// The median and its unit, with this many decimal places.
    pub(crate) fn number(self, unit: &str, places: usize) -> String {
        format!("{:.places$} {unit}", self.middle)
    }
}

/// A quantile of sorted numbers.
pub(crate) fn quantile(sorted: &[f64], part: f64) -> f64 {
    let last = sorted.len().checked_sub(1).expect("something was measured");
    sorted[(last as f64 * part).round() as usize]
}

/// Prints a table; the first row is its head.
pub(crate) fn print_table(rows: &[Vec<String>]) {
    let columns = rows.first().map_or(0, Vec::len);
    let widths: Vec<usize> = (0..columns)
        .map(|i| rows.iter().map(|row| row[i].chars().count()).max())
        .map(Option::unwrap_or_default)
        .collect();
    for (i, row) in rows.iter().enumerate() {
        let cells: Vec<String> = row
            .iter()
            .zip(&widths)
            .map(|(cell, &width)| format!("{cell:<width$}"))
            .collect();
        println!("| {} |", cells.join(" | "));
        if i == 0 {
            let dashes: Vec<String> = widths.iter().map(|&width| "-".repeat(width)).collect();
            println!("| {} |", dashes.join(" | "));
        }
    }
    println!();
}

/// A row of a table.
#[macro_export]
macro_rules! row {
    ($($cell:expr),+ $(,)?) => { vec![$($cell.to_string()),+] };
}

/// CPU time of all threads of a process so far, in nanoseconds. The kernel's work for packets that a thread
/// sends counts as that thread's.
pub(crate) fn cpu_ns(pid: u32) -> u64 {
    fs::read_dir(format!("/proc/{pid}/task"))
        .expect("a process that runs")
        .flatten()
        .filter_map(|task| fs::read_to_string(task.path().join("schedstat")).ok())
        .filter_map(|text| text.split(' ').next()?.parse::<u64>().ok())
        .sum()
}

/// The CPU time that a process takes during `action`, as a share of one core.
pub(crate) fn share_of_cpu(pid: u32, action: impl FnOnce()) -> String {
    let (before, start) = (cpu_ns(pid), Instant::now());
    action();
    let used = (cpu_ns(pid) - before) as f64 / start.elapsed().as_nanos() as f64;
    format!("{:.2} %", 100.0 * used)
}

/// Milliseconds since `start`.
pub(crate) fn since(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1e3
}

/// The resident memory of a process.
pub(crate) fn resident(pid: u32) -> String {
    mib(status_kib(pid, "VmRSS"))
}

/// Kilobytes as text.
pub(crate) fn mib(kib: u64) -> String {
    format!("{:.1} MiB", kib as f64 / 1024.0)
}

/// Where a client and its server run.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Placement {
    /// On a CPU each.
    Apart,
    /// Where the scheduler puts them.
    Free,
}

impl Placement {
    pub(crate) const BOTH: [Self; 2] = [Self::Apart, Self::Free];

    /// Places this thread, as the client, and these threads as the server.
    pub(crate) fn place(self, servers: &[Pid]) {
        let all = 0..thread::available_parallelism().map_or(2, usize::from);
        let (client, server) = match self {
            Self::Apart => (0..1, 1..2),
            Self::Free => (all.clone(), all),
        };
        pin(Pid::from_raw(0), client);
        for thread in servers {
            pin(*thread, server.clone());
        }
    }

    pub(crate) fn text(self) -> &'static str {
        match self {
            Self::Apart => "client and server on a CPU each",
            Self::Free => "client and server where the scheduler puts them",
        }
    }
}

/// Runs this many rounds of all variants, in which each variant follows each other one equally often.
pub(crate) fn take_turns<T>(variants: &mut [T], rounds: usize, mut run: impl FnMut(&mut T)) {
    let count = variants.len();
    for round in 0..rounds {
        for i in 0..count {
            run(&mut variants[(round + i) % count]);
        }
    }
}

/// The ratios of a measurement of each variant to that of the first one.
pub(crate) fn ratios<T>(variants: &[T], of: impl Fn(&T) -> &[f64]) -> Vec<Spread> {
    let bare = of(&variants[0]);
    let others = variants[1..].iter();
    others.map(|it| Spread::of_ratios(of(it), bare)).collect()
}

/// Pins a thread, and the threads that it starts, to these CPUs.
fn pin(thread: Pid, cpus: Range<usize>) {
    let mut set = CpuSet::new();
    for cpu in cpus {
        set.set(cpu).expect("a CPU's number");
    }
    sched_setaffinity(thread, &set).expect("the machine has two CPUs");
}

/// A field of `/proc/<pid>/status` in kB.
pub(crate) fn status_kib(pid: u32, field: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("a process that runs");
    status
        .lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))
        .and_then(|value| value.trim().strip_suffix("kB")?.trim().parse().ok())
        .unwrap_or_else(|| panic!("/proc/{pid}/status has no {field}"))
}
