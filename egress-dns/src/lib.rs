//! Reads and writes DNS messages.
//!
//! [`question`] and [`wire`] parse queries, and the parts of a response that must match its query, without a
//! library: the header and one uncompressed name are little to parse, and the agent's decisions depend on
//! them. hickory-proto decodes the records of a response ([`answer`]).

pub mod answer;
pub mod name;
pub mod question;
pub mod record_type;
pub mod refusal;
mod wire;

#[cfg(any(test, feature = "packets"))]
pub mod in_kernel;
#[cfg(any(test, feature = "packets"))]
pub mod packets;

pub use answer::{Answer, AnswerError, Learned, read_answer, read_beginning, read_rejection};
pub use name::Name;
pub use question::{Question, QuestionError, read_question};
pub use record_type::type_name;
pub use refusal::{Refusal, refuse};
pub use wire::PlainNameError;
