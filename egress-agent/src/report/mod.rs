//! Denial lines on standard output.
//!
//! ```text
//!  denials ring reader ─┐ report(), never blocks
//!  gate thread ─────────┴─▶ bounded channel ─▶ reporter thread: Folder ─▶ one JSON line each
//! ```
//!
//! Denials of the same (pod, destination, port, protocol, reason) are folded into one line with a
//! count. The first line of such a series comes within a second of its first packet; while the
//! series goes on, a further line comes every [`folder::SERIES_EVERY`].
//!
//! A pod has its own share of the channel, of open series and of lines, so that a flood from one pod hides no
//! denial of another. Denials that are not reported are counted, and a line of its own reports the count
//! (`denials_lost`).

pub mod count;
mod decided;
pub mod denied;
mod flows;
pub mod folder;
pub mod line;
pub mod log;
mod policies;
pub mod reporter;
pub mod subject;
mod summary;

pub use count::{Counter, DenialCounts, Gauge, Histogram};
pub use decided::{DecidedBy, is_for_lack_of_an_entry};
pub use denied::{Denied, Endpoint, PodIdentity, Verdict};
pub use folder::Folder;
pub use line::Line;
pub use line::rfc3339;
pub use policies::PolicyCounts;
pub use reporter::{Listener, Lost, Reporter, ReporterThread};
pub use subject::{IfName, Subject};
pub use summary::Summary;
