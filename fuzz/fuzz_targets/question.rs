//! Compares how the agent reads a query with how another DNS library reads it.
#![no_main]

use egress_dns::{Refusal, read_answer, read_question, refuse};
use hickory_proto::op::Message;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|message: &[u8]| {
    let Ok(question) = read_question(message) else {
        return;
    };
    assert!(question.name_as_sent.len() <= 255);
    assert_eq!(
        question.name.as_wire().len() + 1,
        question.name_as_sent.len()
    );

    // What passes here, a resolver reads: it must find the name that was judged and no other.
    if let Ok(theirs) = Message::from_vec(message) {
        assert_eq!(theirs.queries.len(), 1);
        let query = &theirs.queries[0];
        assert_eq!(u16::from(query.query_type()), question.qtype);
        let labels: Vec<u8> = query
            .name()
            .iter()
            .flat_map(|label| [&[label.len() as u8], label].concat())
            .collect();
        assert_eq!(labels, question.name_as_sent[..labels.len()]);
        assert_eq!(labels.len() + 1, question.name_as_sent.len());
    }

    // Its refusal is an answer to it.
    for how in [Refusal::NxDomain, Refusal::Refused] {
        let refusal = refuse(&question, how);
        let answer = read_answer(&refusal).expect("a refusal can be read");
        assert_eq!(answer.name_as_sent, question.name_as_sent);
        assert_eq!((answer.id, answer.qtype), (question.id, question.qtype));
        assert!(answer.addresses.is_empty());
    }
});
