//! What a DNS message says.
//!
//! Questions and whatever an answer is matched by are read by hand ([`question`], [`wire`]): the
//! header and one uncompressed name are little to read, and they are what the agent decides on.
//! The records an answer teaches from are decoded by hickory-proto ([`answer`]).

pub mod answer;
pub mod name;
pub mod question;
pub mod record_type;
pub mod refusal;
mod wire;

#[cfg(any(test, feature = "packets"))]
pub mod packets;

pub use answer::{Answer, AnswerError, Learned, read_answer, read_beginning, read_rejection};
pub use name::Name;
pub use question::{Question, QuestionError, read_question};
pub use record_type::type_name;
pub use refusal::{Refusal, refuse};
pub use wire::PlainNameError;
