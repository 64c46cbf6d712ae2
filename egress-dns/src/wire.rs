//! The parts of the wire format that are parsed without a library: the header, one uncompressed name, and the
//! outline of a record (RFC 1035, section 4.1).

use super::{
    Name,
    name::{LABEL_MAX, NAME_MAX, NameError},
};

/// The length of the header in bytes (RFC 1035, section 4.1.1).
pub(super) const HEADER_BYTES: usize = 12;
/// The longest message in bytes: the greatest value of the length field of DNS over TCP (RFC 1035, section
/// 4.2.2). A UDP datagram cannot have more.
pub(super) const MESSAGE_MAX: usize = u16::MAX as usize;
/// The shortest record in bytes: the root's name, type, class, TTL and the length of empty data.
pub(super) const RECORD_MIN: usize = 11;

/// Class IN.
pub(super) const CLASS_IN: u16 = 1;
/// Type OPT (RFC 6891).
pub(super) const TYPE_OPT: u16 = 41;

const QR: u16 = 1 << 15;
const TC: u16 = 1 << 9;
const RD: u16 = 1 << 8;
const CD: u16 = 1 << 4;

/// The header of a message.
#[derive(Clone, Copy, Debug)]
pub(super) struct Header {
    pub(super) id: u16,
    flags: u16,
    pub(super) questions: u16,
    pub(super) answers: u16,
    pub(super) authorities: u16,
    pub(super) additionals: u16,
}

impl Header {
    pub(super) fn is_response(self) -> bool {
        self.flags & QR != 0
    }

    pub(super) fn opcode(self) -> u8 {
        (self.flags >> 11) as u8 & 0x0f
    }

    pub(super) fn truncated(self) -> bool {
        self.flags & TC != 0
    }

    pub(super) fn recursion_desired(self) -> bool {
        self.flags & RD != 0
    }

    pub(super) fn checking_disabled(self) -> bool {
        self.flags & CD != 0
    }

    pub(super) fn response_code(self) -> u8 {
        (self.flags & 0x0f) as u8
    }
}

/// The bytes end before the item that is being read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Truncated;

/// Why a name cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlainNameError {
    /// The message ends inside the name.
    #[error("the message ends inside the name")]
    Truncated,
    /// A compression pointer: it could only point to the question itself or behind it.
    #[error("the name is compressed")]
    Compressed,
    /// A length byte that begins with the bits 01 or 10 (reserved, RFC 6891, section 5). The length byte of a
    /// label over [`LABEL_MAX`] bytes looks like this.
    #[error("a label has the reserved length byte {0:#04x}")]
    Label(u8),
    /// Over [`NAME_MAX`] bytes.
    #[error("the name is longer than {NAME_MAX} bytes")]
    TooLong,
}

/// A record's fixed fields, and its position in the message.
#[derive(Clone, Copy, Debug)]
pub(super) struct Outline<'a> {
    /// The offset of its first byte.
    pub(super) start: usize,
    /// Whether its name is the root's, uncompressed.
    pub(super) at_root: bool,
    pub(super) record_type: u16,
    pub(super) class: u16,
    pub(super) ttl: u32,
    pub(super) data: &'a [u8],
}

/// Reads a message from front to back.
#[derive(Clone, Debug)]
pub(super) struct Reader<'a> {
    message: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    pub(super) fn new(message: &'a [u8]) -> Self {
        Self { message, at: 0 }
    }

    /// The number of bytes that have not been read.
    pub(super) fn remaining(&self) -> usize {
        self.message.len().saturating_sub(self.at)
    }

    /// The offset of the next byte.
    pub(super) fn at(&self) -> usize {
        self.at
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], Truncated> {
        let end = self.at.checked_add(len).ok_or(Truncated)?;
        let bytes = self.message.get(self.at..end).ok_or(Truncated)?;
        self.at = end;
        Ok(bytes)
    }

    fn u8(&mut self) -> Result<u8, Truncated> {
        self.take(1)?.first().copied().ok_or(Truncated)
    }

    pub(super) fn u16(&mut self) -> Result<u16, Truncated> {
        let bytes = self.take(2)?;
        Ok(u16::from_be_bytes(bytes.try_into().map_err(|_| Truncated)?))
    }

    fn u32(&mut self) -> Result<u32, Truncated> {
        let bytes = self.take(4)?;
        Ok(u32::from_be_bytes(bytes.try_into().map_err(|_| Truncated)?))
    }

    pub(super) fn header(&mut self) -> Result<Header, Truncated> {
        Ok(Header {
            id: self.u16()?,
            flags: self.u16()?,
            questions: self.u16()?,
            answers: self.u16()?,
            authorities: self.u16()?,
            additionals: self.u16()?,
        })
    }

    /// Reads a name without compression. Returns its bytes, including the root's zero byte, and the name.
    pub(super) fn plain_name(&mut self) -> Result<(&'a [u8], Name), PlainNameError> {
        let start = self.at;
        loop {
            match self.u8().map_err(|Truncated| PlainNameError::Truncated)? {
                0 => break,
                len if usize::from(len) <= LABEL_MAX => {
                    self.take(usize::from(len))
                        .map_err(|Truncated| PlainNameError::Truncated)?;
                }
                len if len & 0xc0 == 0xc0 => return Err(PlainNameError::Compressed),
                len => return Err(PlainNameError::Label(len)),
            }
            if self.at - start >= NAME_MAX {
                return Err(PlainNameError::TooLong);
            }
        }
        let wire = self
            .message
            .get(start..self.at)
            .ok_or(PlainNameError::Truncated)?;
        let name = Name::from_labels(labels(wire)).map_err(|error| match error {
            NameError::NameTooLong => PlainNameError::TooLong,
            // The loop above stops at an empty label, and rejects labels that are too long.
            NameError::EmptyLabel | NameError::LabelTooLong => PlainNameError::Truncated,
        })?;
        Ok((wire, name))
    }

    /// Skips a name; does not follow pointers.
    fn skip_name(&mut self) -> Result<(), Truncated> {
        loop {
            match self.u8()? {
                0 => return Ok(()),
                len if len & 0xc0 == 0xc0 => {
                    self.u8()?;
                    return Ok(());
                }
                // Reserved label types are treated as the end of the message.
                len if usize::from(len) > LABEL_MAX => return Err(Truncated),
                len => {
                    self.take(usize::from(len))?;
                }
            }
        }
    }

    /// Reads the outline of a record.
    pub(super) fn outline(&mut self) -> Result<Outline<'a>, Truncated> {
        let start = self.at;
        self.skip_name()?;
        let at_root = self.at - start == 1;
        let record_type = self.u16()?;
        let class = self.u16()?;
        let ttl = self.u32()?;
        let len = self.u16()?;
        let data = self.take(usize::from(len))?;
        Ok(Outline {
            start,
            at_root,
            record_type,
            class,
            ttl,
            data,
        })
    }
}

/// The labels of an uncompressed name that ends with the root's zero byte.
fn labels(wire: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = wire;
    std::iter::from_fn(move || {
        let (&len, tail) = rest.split_first()?;
        if len == 0 {
            return None;
        }
        let (label, tail) = tail.split_at_checked(usize::from(len))?;
        rest = tail;
        Some(label)
    })
}
