//! A file system for the kernel to start from: an uncompressed cpio archive in the format "newc"
//! (Documentation/driver-api/early-userspace/buffer-format.rst in the kernel's sources).

use std::collections::BTreeSet;

use anyhow::{Context as _, Result};

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const LINK: u32 = 0o120_777;
/// The name of the last entry of an archive.
const TRAILER: &str = "TRAILER!!!";
/// Alignment of headers with their names, and of contents.
const ALIGNMENT: usize = 4;

/// An archive under construction. Everything in it belongs to root.
#[derive(Default)]
pub(super) struct Archive {
    bytes: Vec<u8>,
    names: BTreeSet<String>,
}

impl Archive {
    /// Adds a directory, unless it exists.
    ///
    /// # Errors
    ///
    /// Fails, like the other methods, when an entry is too long for the format.
    pub(super) fn directory(&mut self, path: &str) -> Result<()> {
        self.add(path, DIRECTORY, &[])
    }

    /// Adds an executable file, unless it exists.
    pub(super) fn program(&mut self, path: &str, content: &[u8]) -> Result<()> {
        self.add(path, PROGRAM, content)
    }

    /// Adds a symbolic link, unless it exists.
    pub(super) fn link(&mut self, path: &str, target: &str) -> Result<()> {
        self.add(path, LINK, target.as_bytes())
    }

    /// The whole archive.
    pub(super) fn finish(mut self) -> Result<Vec<u8>> {
        self.entry(TRAILER, 0, &[])?;
        Ok(self.bytes)
    }

    fn add(&mut self, path: &str, mode: u32, content: &[u8]) -> Result<()> {
        if self.names.contains(path) {
            return Ok(());
        }
        // The kernel needs a directory before its contents.
        if let Some((above, _)) = path.rsplit_once('/') {
            self.directory(above)?;
        }
        self.entry(path, mode, content)
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) -> Result<()> {
        let size =
            u32::try_from(content.len()).with_context(|| format!("{path} is too long for cpio"))?;
        let name_size = u32::try_from(path.len() + 1).context("a path is too long for cpio")?;
        let inode = u32::try_from(self.names.len() + 1).context("too many files for cpio")?;
        let (owner, links, time, device, checksum) = (0, 1, 0, 0, 0);
        let fields = [
            inode, mode, owner, owner, links, time, size, device, device, device, device,
            name_size, checksum,
        ];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(path.bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend(content);
        self.align();
        self.names.insert(path.to_owned());
        Ok(())
    }

    fn align(&mut self) {
        let length = self.bytes.len().next_multiple_of(ALIGNMENT);
        self.bytes.resize(length, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_come_before_their_contents_and_only_once() {
        let mut archive = Archive::default();
        archive.program("usr/bin/a", b"12345").expect("added");
        archive.program("usr/bin/b", b"").expect("added");
        archive.program("usr/bin/a", b"again").expect("ignored");
        let bytes = archive.finish().expect("an archive");

        assert_eq!(bytes.len() % ALIGNMENT, 0);
        let text = String::from_utf8(bytes).expect("ASCII");
        let entries: Vec<_> = text.split("070701").skip(1).collect();
        let names: Vec<_> = entries
            .iter()
            .map(|entry| entry[104..].split('\0').next().unwrap_or_default())
            .collect();
        assert_eq!(names, ["usr", "usr/bin", "usr/bin/a", "usr/bin/b", TRAILER]);
        assert!(entries[2].contains("12345"));
    }

    #[test]
    fn a_header_has_the_fields_of_the_format() {
        let mut archive = Archive::default();
        archive.program("a", b"123").expect("added");
        let bytes = archive.finish().expect("an archive");
        let header = concat!(
            "070701", "00000001", "000081ed", "00000000", "00000000", "00000001", "00000000",
            "00000003", "00000000", "00000000", "00000000", "00000000", "00000002", "00000000",
            "a\0", "123\0", "070701"
        );
        assert!(bytes.starts_with(header.as_bytes()));
    }
}
