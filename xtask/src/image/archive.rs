//! The OCI archive: an image layout (image-layout.md of the OCI image specification) in a tar file.

use std::collections::BTreeMap;
use std::io::Write as _;

use anyhow::{Context as _, Result};
use flate2::{Compression, GzBuilder};
use jiff::Timestamp;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tar::{Builder, EntryType, Header};

/// The program's path in the image.
const PROGRAM: &str = "usr/local/bin/egress-agent";

/// The parts of an image.
pub(super) struct Image<'a> {
    /// The program, static.
    pub(super) program: &'a [u8],
    /// Repository and tag.
    pub(super) name: &'a str,
    /// The program's version.
    pub(super) version: &'a str,
    /// The name of images for it: `amd64`.
    pub(super) architecture: &'a str,
    /// The commit of the sources.
    pub(super) revision: &'a str,
    /// The time of all files, in seconds since 1970.
    pub(super) seconds: u64,
}

impl Image<'_> {
    /// The whole archive.
    pub(super) fn archive(&self) -> Result<Vec<u8>> {
        let mut blobs = Blobs::default();
        let files = self.layer()?;
        let layer = blobs.add(
            "application/vnd.oci.image.layer.v1.tar+gzip",
            compressed(&files)?,
        );
        let config = self.config(&sha256(&files))?;
        let config = blobs.add(
            "application/vnd.oci.image.config.v1+json",
            serde_json::to_vec(&config)?,
        );
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config,
            "layers": [layer],
        });
        let mut manifest = blobs.add(
            "application/vnd.oci.image.manifest.v1+json",
            serde_json::to_vec(&manifest)?,
        );
        manifest["platform"] = json!({"architecture": self.architecture, "os": "linux"});
        // Programs that load archives read the image's name from different annotations.
        manifest["annotations"] = json!({
            "io.containerd.image.name": self.name,
            "org.opencontainers.image.ref.name": self.name,
        });
        let index = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [manifest],
        });

        let mut archive = Builder::new(Vec::new());
        self.directory(&mut archive, "blobs")?;
        self.directory(&mut archive, "blobs/sha256")?;
        for (digest, bytes) in &blobs.0 {
            self.file(
                &mut archive,
                &format!("blobs/sha256/{digest}"),
                0o644,
                bytes,
            )?;
        }
        self.file(
            &mut archive,
            "index.json",
            0o644,
            &serde_json::to_vec(&index)?,
        )?;
        let layout = json!({"imageLayoutVersion": "1.0.0"});
        self.file(
            &mut archive,
            "oci-layout",
            0o644,
            &serde_json::to_vec(&layout)?,
        )?;
        archive.into_inner().context("cannot end the archive")
    }

    /// The files of the image, uncompressed.
    fn layer(&self) -> Result<Vec<u8>> {
        let mut layer = Builder::new(Vec::new());
        for (at, _) in PROGRAM.match_indices('/') {
            self.directory(&mut layer, &PROGRAM[..at])?;
        }
        self.file(&mut layer, PROGRAM, 0o755, self.program)?;
        layer.into_inner().context("cannot end the layer")
    }

    fn config(&self, layer: &str) -> Result<Value> {
        let created = self.created()?;
        Ok(json!({
            "created": created,
            "architecture": self.architecture,
            "os": "linux",
            "config": {
                // No user: pins, the socket and other processes' namespaces belong to root. Capabilities
                // limit the agent (manifests/base/daemonset.yaml).
                "Env": ["PATH=/usr/local/bin"],
                "Entrypoint": [format!("/{PROGRAM}")],
                "Cmd": ["--help"],
                "Labels": {
                    "org.opencontainers.image.created": created,
                    "org.opencontainers.image.description":
                        "Enforces, per pod, which DNS names, addresses and ports it may reach",
                    "org.opencontainers.image.licenses": "MIT OR Apache-2.0",
                    "org.opencontainers.image.revision": self.revision,
                    "org.opencontainers.image.title": "egress-agent",
                    "org.opencontainers.image.version": self.version,
                },
            },
            "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{layer}")]},
            "history": [{"created": created, "created_by": "cargo xtask image"}],
        }))
    }

    /// The time in the form of RFC 3339.
    fn created(&self) -> Result<String> {
        let time = i64::try_from(self.seconds).ok();
        let time = time.and_then(|seconds| Timestamp::from_second(seconds).ok());
        Ok(time.context("the time is out of range")?.to_string())
    }

    fn directory(&self, archive: &mut Builder<Vec<u8>>, path: &str) -> Result<()> {
        self.entry(
            archive,
            EntryType::Directory,
            &format!("{path}/"),
            0o755,
            &[],
        )
    }

    fn file(
        &self,
        archive: &mut Builder<Vec<u8>>,
        path: &str,
        mode: u32,
        bytes: &[u8],
    ) -> Result<()> {
        self.entry(archive, EntryType::Regular, path, mode, bytes)
    }

    /// Adds an entry owned by root.
    fn entry(
        &self,
        archive: &mut Builder<Vec<u8>>,
        kind: EntryType,
        path: &str,
        mode: u32,
        bytes: &[u8],
    ) -> Result<()> {
        let mut header = Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(self.seconds);
        header.set_size(bytes.len() as u64);
        archive
            .append_data(&mut header, path, bytes)
            .with_context(|| format!("cannot add {path}"))
    }
}

/// Contents by their SHA-256.
#[derive(Default)]
struct Blobs(BTreeMap<String, Vec<u8>>);

impl Blobs {
    /// Adds a blob and returns its descriptor.
    fn add(&mut self, media_type: &str, bytes: Vec<u8>) -> Value {
        let digest = sha256(&bytes);
        let descriptor = json!({
            "mediaType": media_type,
            "digest": format!("sha256:{digest}"),
            "size": bytes.len(),
        });
        self.0.insert(digest, bytes);
        descriptor
    }
}

fn compressed(bytes: &[u8]) -> Result<Vec<u8>> {
    // The header contains neither a name nor a time.
    let mut encoder = GzBuilder::new()
        .mtime(0)
        .write(Vec::new(), Compression::best());
    encoder.write_all(bytes).context("cannot compress")?;
    encoder.finish().context("cannot compress")
}

fn sha256(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    Sha256::digest(bytes)
        .iter()
        .fold(String::new(), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        })
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use flate2::read::GzDecoder;

    use super::*;

    fn image() -> Image<'static> {
        Image {
            program: b"a program",
            name: "registry.invalid/egress-agent:1.2.3",
            version: "1.2.3",
            architecture: "amd64",
            revision: "abc",
            seconds: 1_795_250_312,
        }
    }

    fn entries(archive: &[u8]) -> BTreeMap<String, Vec<u8>> {
        tar::Archive::new(archive)
            .entries()
            .expect("an archive")
            .map(|entry| {
                let mut entry = entry.expect("an entry");
                let header = entry.header();
                assert_eq!((header.uid().unwrap(), header.gid().unwrap()), (0, 0));
                assert_eq!(header.mtime().unwrap(), image().seconds);
                let path = entry.path().expect("a path").display().to_string();
                let mut bytes = Vec::new();
                entry.read_to_end(&mut bytes).expect("its bytes");
                (path, bytes)
            })
            .collect()
    }

    #[test]
    fn every_blob_is_at_the_path_of_its_digest() {
        let entries = entries(&image().archive().unwrap());
        let blob = |descriptor: &Value| {
            let digest = descriptor["digest"].as_str().unwrap();
            let digest = digest.strip_prefix("sha256:").unwrap();
            let bytes = &entries[&format!("blobs/sha256/{digest}")];
            assert_eq!(sha256(bytes), digest);
            assert_eq!(descriptor["size"], bytes.len());
            bytes.clone()
        };
        let read = |bytes: &[u8]| serde_json::from_slice::<Value>(bytes).unwrap();
        assert_eq!(read(&entries["oci-layout"])["imageLayoutVersion"], "1.0.0");
        let index = read(&entries["index.json"]);
        let manifest = read(&blob(&index["manifests"][0]));
        let config = read(&blob(&manifest["config"]));
        assert_eq!(config["created"], "2026-11-21T08:38:32Z");
        let layer = blob(&manifest["layers"][0]);
        let mut files = Vec::new();
        GzDecoder::new(&layer[..]).read_to_end(&mut files).unwrap();
        assert_eq!(
            config["rootfs"]["diff_ids"][0],
            format!("sha256:{}", sha256(&files))
        );
        let files = self::entries(&files);
        assert_eq!(files[PROGRAM], b"a program");
        assert_eq!(config["config"]["Entrypoint"][0], format!("/{PROGRAM}"));
    }

    #[test]
    fn the_same_sources_result_in_the_same_bytes() {
        assert!(image().archive().unwrap() == image().archive().unwrap());
    }
}
