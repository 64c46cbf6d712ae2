//! A builder of DNS messages for tests. It can also build messages that no honest program would send.

/// A message that is being built.
#[derive(Clone, Debug)]
#[must_use]
pub struct Packet {
    flags: u16,
    counts: [u16; 4],
    question: Vec<u8>,
    sections: [Vec<u8>; 3],
}

impl Packet {
    /// The id of each message of this builder.
    pub const ID: u16 = 0xbeef;
    const RD: u16 = 0x0100;
    const RESPONSE: u16 = 0x8180;

    /// A query with one question of class IN.
    pub fn query(name: &str, qtype: u16) -> Self {
        Self::query_of_wire(&wire_name(name), qtype)
    }

    /// A query with this name in wire form.
    pub fn query_of_wire(name: &[u8], qtype: u16) -> Self {
        let question = [name, &qtype.to_be_bytes(), &[0, 1]].concat();
        Self {
            flags: Self::RD,
            counts: [1, 0, 0, 0],
            question,
            sections: Default::default(),
        }
    }

    /// A response with RCODE 0 to [`Self::query`].
    pub fn response(name: &str, qtype: u16) -> Self {
        Self::query(name, qtype).flags(Self::RESPONSE)
    }

    /// Replaces the 16 bits after the id.
    pub fn flags(mut self, flags: u16) -> Self {
        self.flags = flags;
        self
    }

    /// Replaces QDCOUNT, whatever the section contains.
    pub fn questions(mut self, count: u16) -> Self {
        self.counts[0] = count;
        self
    }

    /// Replaces ANCOUNT, whatever the section contains.
    pub fn answers(mut self, count: u16) -> Self {
        self.counts[1] = count;
        self
    }

    /// Adds a record to the answer section.
    pub fn answer(self, record: &[u8]) -> Self {
        self.push(0, record)
    }

    /// Adds a record to the authority section.
    pub fn authority(self, record: &[u8]) -> Self {
        self.push(1, record)
    }

    /// Adds a record to the additional section.
    pub fn additional(self, record: &[u8]) -> Self {
        self.push(2, record)
    }

    fn push(mut self, section: usize, record: &[u8]) -> Self {
        self.counts[section + 1] += 1;
        self.sections[section].extend(record);
        self
    }

    /// The message in wire format.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for field in [Self::ID, self.flags].iter().chain(&self.counts) {
            bytes.extend(field.to_be_bytes());
        }
        bytes.extend(&self.question);
        for section in &self.sections {
            bytes.extend(section);
        }
        bytes
    }
}

/// The wire form of a name without escapes; `""` is the root.
///
/// # Panics
///
/// When a label is longer than 255 bytes.
pub fn wire_name(name: &str) -> Vec<u8> {
    let mut wire = Vec::new();
    for label in name.split('.').filter(|label| !label.is_empty()) {
        wire.push(u8::try_from(label.len()).unwrap());
        wire.extend(label.as_bytes());
    }
    wire.push(0);
    wire
}

/// A record with these fields; `name` is in wire form.
///
/// # Panics
///
/// When `data` is longer than 65,535 bytes.
pub fn record(name: &[u8], record_type: u16, class: u16, ttl: u32, data: &[u8]) -> Vec<u8> {
    let len = u16::try_from(data.len()).unwrap();
    [
        name,
        &record_type.to_be_bytes(),
        &class.to_be_bytes(),
        &ttl.to_be_bytes(),
        &len.to_be_bytes(),
        data,
    ]
    .concat()
}
