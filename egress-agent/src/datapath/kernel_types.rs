//! Offsets of fields in the running kernel's structures, from its type information
//! (`/sys/kernel/btf/vmlinux`, Documentation/bpf/btf.rst).

use anyhow::{Context as _, Result, bail, ensure};

/// The file with the kernel's types.
const PATH: &str = "/sys/kernel/btf/vmlinux";

const MAGIC: u16 = 0xeb9f;
const HEADER_LEN: usize = 24;

// Kinds of types (`include/uapi/linux/btf.h`).
const INT: u32 = 1;
const ARRAY: u32 = 3;
const STRUCT: u32 = 4;
const UNION: u32 = 5;
const ENUM: u32 = 6;
const FUNC_PROTO: u32 = 13;
const VAR: u32 = 14;
const DATASEC: u32 = 15;
const DECL_TAG: u32 = 17;
const ENUM64: u32 = 19;

/// How deep anonymous structures may be nested; the kernel nests three at most.
const DEPTH: u32 = 8;

/// The kernel's types.
pub(super) struct KernelTypes {
    bytes: Vec<u8>,
    strings: usize,
    /// Offset of each type's description; the first type has the number 1.
    types: Vec<usize>,
}

/// The position of a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Field {
    /// In bits from the beginning of the structure.
    bits: u32,
}

impl Field {
    /// In bytes from the beginning of the structure.
    pub(super) const fn byte(self) -> u32 {
        self.bits / 8
    }

    /// In bits from the beginning of that byte; not zero for some bit-fields only.
    pub(super) const fn shift(self) -> u32 {
        self.bits % 8
    }
}

impl KernelTypes {
    /// Reads the types of the running kernel.
    ///
    /// # Errors
    ///
    /// When the kernel does not provide them or they cannot be parsed.
    pub(super) fn of_this_kernel() -> Result<Self> {
        let bytes = std::fs::read(PATH).with_context(|| {
            format!("cannot read {PATH}: the kernel needs BTF (CONFIG_DEBUG_INFO_BTF)")
        })?;
        Self::parse(bytes).with_context(|| format!("cannot parse {PATH}"))
    }

    fn parse(bytes: Vec<u8>) -> Result<Self> {
        ensure!(
            half(&bytes, 0)? == MAGIC,
            "it does not begin with the magic number of type information"
        );
        let header_len = word(&bytes, 4)? as usize;
        ensure!(header_len >= HEADER_LEN, "its header is too short");
        let first = header_len + word(&bytes, 8)? as usize;
        let end = first + word(&bytes, 12)? as usize;
        let strings = header_len + word(&bytes, 16)? as usize;
        let mut types = Vec::new();
        let mut at = first;
        while at < end {
            types.push(at);
            at += description_len(word(&bytes, at + 4)?)?;
        }
        Ok(Self {
            bytes,
            strings,
            types,
        })
    }

    /// The position of a field, in the structure itself or in an anonymous structure or union in it.
    ///
    /// # Errors
    ///
    /// When the structure or the field does not exist.
    pub(super) fn field(&self, structure: &str, field: &str) -> Result<Field> {
        self.find(structure, field)?
            .with_context(|| format!("the kernel's `struct {structure}` has no field `{field}`"))
    }

    /// As [`Self::field`], for a field that some kernels do not have.
    ///
    /// # Errors
    ///
    /// When the structure does not exist.
    pub(super) fn find(&self, structure: &str, field: &str) -> Result<Option<Field>> {
        for &at in &self.types {
            let (kind, len, _) = info(word(&self.bytes, at + 4)?);
            // A declaration without fields has another kind.
            if kind == STRUCT && len > 0 && self.name(at)? == structure.as_bytes() {
                let bits = self.find_in(at, field.as_bytes(), DEPTH)?;
                return Ok(bits.map(|bits| Field { bits }));
            }
        }
        bail!("the kernel has no `struct {structure}`")
    }

    fn find_in(&self, structure: usize, field: &[u8], depth: u32) -> Result<Option<u32>> {
        let (kind, len, has_bit_fields) = info(word(&self.bytes, structure + 4)?);
        if !matches!(kind, STRUCT | UNION) || depth == 0 {
            return Ok(None);
        }
        for member in 0..len as usize {
            let at = structure + 12 + 12 * member;
            let place = word(&self.bytes, at + 8)?;
            // With bit-fields, the upper byte is the width.
            let bits = if has_bit_fields {
                place & 0x00ff_ffff
            } else {
                place
            };
            let name = self.name(at)?;
            if name == field {
                return Ok(Some(bits));
            }
            if name.is_empty() {
                let inner = word(&self.bytes, at + 4)?;
                if let Some(&inner) = self.types.get((inner as usize).wrapping_sub(1))
                    && let Some(found) = self.find_in(inner, field, depth - 1)?
                {
                    return Ok(Some(bits + found));
                }
            }
        }
        Ok(None)
    }

    /// The name of the type or member at `at`; empty if it has none.
    fn name(&self, at: usize) -> Result<&[u8]> {
        let start = self.strings + word(&self.bytes, at)? as usize;
        let rest = self
            .bytes
            .get(start..)
            .context("the text of a name is beyond the end")?;
        let len = rest.iter().position(|byte| *byte == 0).unwrap_or(0);
        Ok(&rest[..len])
    }
}

/// Kind, number of members, and whether there are bit-fields.
const fn info(word: u32) -> (u32, u32, bool) {
    (word >> 24 & 0x1f, word & 0xffff, word >> 31 != 0)
}

/// Length of a type's description.
fn description_len(word: u32) -> Result<usize> {
    let (kind, members, _) = info(word);
    let members = members as usize;
    Ok(12
        + match kind {
            // Pointers, typedefs and similar kinds refer to another type; 16 is a float.
            2 | 7..=12 | 16 | 18 => 0,
            INT | VAR | DECL_TAG => 4,
            ARRAY => 12,
            STRUCT | UNION | DATASEC | ENUM64 => 12 * members,
            ENUM | FUNC_PROTO => 8 * members,
            _ => bail!("a type has the unknown kind {kind}"),
        })
}

fn word(bytes: &[u8], at: usize) -> Result<u32> {
    let bytes = bytes.get(at..).and_then(<[u8]>::first_chunk);
    Ok(u32::from_ne_bytes(*bytes.context("it ends too early")?))
}

fn half(bytes: &[u8], at: usize) -> Result<u16> {
    let bytes = bytes.get(at..).and_then(<[u8]>::first_chunk);
    Ok(u16::from_ne_bytes(*bytes.context("it ends too early")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn this_kernel() -> KernelTypes {
        KernelTypes::of_this_kernel().expect("the kernel's types")
    }

    #[test]
    fn fields_are_found_at_the_kernels_offsets() {
        let types = this_kernel();
        let place = |name| types.field("sk_buff", name).expect("a field");
        // `next` is the first field, and `prev` follows in the same anonymous structure.
        assert_eq!(place("next").byte(), 0);
        assert_eq!(place("prev").byte(), 8);
        assert_eq!(place("csum").byte(), place("csum_start").byte());
        assert_eq!(place("csum_offset").byte(), place("csum_start").byte() + 2);
        assert_eq!(place("data").byte(), place("head").byte() + 8);
        assert_eq!(place("pkt_type").byte(), place("ip_summed").byte());
        assert_eq!(place("pkt_type").shift(), 0);
        assert_ne!(place("ip_summed").shift(), 0);
    }

    #[test]
    fn the_error_names_a_missing_structure_or_field() {
        let types = this_kernel();
        let error_of = |structure, field| {
            let error = types.field(structure, field).expect_err("not there");
            error.to_string()
        };
        assert_eq!(
            error_of("sk_buff", "color"),
            "the kernel's `struct sk_buff` has no field `color`"
        );
        assert_eq!(
            error_of("sk_buf", "len"),
            "the kernel has no `struct sk_buf`"
        );
        assert_eq!(types.find("sk_buff", "color").expect("a structure"), None);
    }

    #[test]
    fn truncated_type_information_is_an_error() {
        let whole = this_kernel().bytes;
        for len in [0, 2, 10, HEADER_LEN, 1000] {
            assert!(KernelTypes::parse(whole[..len].to_vec()).is_err(), "{len}");
        }
        let error = KernelTypes::parse(vec![0; 100]).err().expect("no types");
        assert_eq!(
            error.to_string(),
            "it does not begin with the magic number of type information"
        );
    }
}
