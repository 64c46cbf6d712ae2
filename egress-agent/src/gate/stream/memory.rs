//! Byte buffers that take hardly more memory than their bytes need. The limits count what is allocated, so a buffer
//! that has been full and has one byte left must not keep the room of all the others.

/// A buffer's memory is a multiple of this, or a power of two below it.
const BLOCK: usize = 4 << 10;
/// Appends bytes. A vector that grows by itself doubles its memory.
pub(super) fn append(bytes: &mut Vec<u8>, more: &[u8]) {
    let len = bytes.len() + more.len();
    if len > bytes.capacity() {
        // The first bytes are often all.
        let room = if bytes.is_empty() { len } else { block(len) };
        bytes.reserve_exact(room - bytes.len());
    }
    bytes.extend_from_slice(more);
}

/// Removes bytes from the front, and frees memory that the rest does not need. An empty buffer has none.
pub(super) fn remove_front(bytes: &mut Vec<u8>, count: usize) {
    bytes.drain(..count.min(bytes.len()));
    if bytes.is_empty() || bytes.capacity() > 2 * bytes.len() + BLOCK {
        bytes.shrink_to_fit();
    }
}

fn block(len: usize) -> usize {
    if len > BLOCK {
        len.next_multiple_of(BLOCK)
    } else {
        len.next_power_of_two()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_memory_follows_the_bytes(
            steps in prop::collection::vec((0usize..20_000, any::<prop::sample::Index>()), 1..60),
        ) {
            let (mut bytes, mut plain) = (Vec::new(), Vec::new());
            for (step, (more, removed)) in steps.into_iter().enumerate() {
                let more = vec![step as u8; more];
                append(&mut bytes, &more);
                plain.extend_from_slice(&more);
                prop_assert!(bytes.capacity() <= 2 * bytes.len() + 2 * BLOCK);
                let removed = removed.index(plain.len() + 1);
                remove_front(&mut bytes, removed);
                plain.drain(..removed);
                prop_assert_eq!(&bytes, &plain);
                prop_assert!(bytes.capacity() <= 2 * bytes.len() + BLOCK);
            }
            let len = bytes.len();
            remove_front(&mut bytes, len);
            prop_assert_eq!(bytes.capacity(), 0);
        }
    }
}
