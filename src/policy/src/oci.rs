//! A plugin out of an OCI image layout, as tools that pull from registries lay it down: a folder with `oci-layout`, `index.json` and
//! `blobs/sha256/` (OCI image specification 1.1, image-layout.md). Everything in it is a stranger's until its digest was checked, and
//! bounded before: an index, a manifest, a layer.

use std::{fs::File, io::Read, path::Path};

use rustix::fs::{Mode, OFlags, open};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::{Fault, PolicyError, limits::HOST_LIMITS, text::hex};

/// An index or a manifest.
const JSON_BYTES: usize = 256 << 10;
/// Descriptors in one of them.
const DESCRIPTORS: usize = 64;
/// Indexes in indexes, below `index.json`.
const DEPTH: u32 = 2;
/// How a layer with a component is called: the Wasm working group's name, and the one that came before it.
const WASM: [&str; 2] = ["application/wasm", "application/vnd.wasm.content.layer.v1+wasm"];
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Layout {
    image_layout_version: String,
}

#[derive(Deserialize)]
struct Index {
    manifests: Vec<Descriptor>,
}

#[derive(Deserialize)]
struct Manifest {
    layers: Vec<Descriptor>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    media_type: String,
    digest: String,
    size: u64,
}

impl Descriptor {
    /// The digest's hexadecimal digits; nothing else can become a file's name.
    fn sha256(&self) -> Result<&str, String> {
        let digits = self.digest.strip_prefix("sha256:").filter(|digits| {
            digits.len() == 64 && digits.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
        });
        digits.ok_or_else(|| format!("{:?} is no sha256 digest", short(&self.digest)))
    }
}

/// A component and its digest. `sha256` names the component's own layer, or the manifest, as registries do.
pub(crate) fn component(folder: &Path, sha256: &str) -> Result<(Vec<u8>, String), PolicyError> {
    let found = Store { folder }.component(sha256);
    found.map_err(|(fault, cause)| PolicyError::new(fault, folder.display(), cause))
}

type Refused = (Fault, String);

struct Store<'a> {
    folder: &'a Path,
}

impl Store<'_> {
    fn component(&self, sha256: &str) -> Result<(Vec<u8>, String), Refused> {
        let layout: Layout = self.json(&self.read("oci-layout", 1 << 10)?, "oci-layout")?;
        if !layout.image_layout_version.starts_with("1.") {
            let cause = format!("its layout is version {:?}, not 1", short(&layout.image_layout_version));
            return Err((Fault::Oci, cause));
        }
        let index: Index = self.json(&self.read("index.json", JSON_BYTES)?, "index.json")?;
        let layer = self.find(&index.manifests, sha256, DEPTH)?.ok_or_else(|| {
            (Fault::Oci, format!("no manifest and no Wasm layer in it has the sha256 {sha256}"))
        })?;
        let most = HOST_LIMITS.component_bytes as u64;
        if layer.size > most {
            return Err((Fault::Size, format!("its layer has more than {} MiB", most >> 20)));
        }
        let digest = layer.sha256().map_err(|cause| (Fault::Oci, cause))?.to_owned();
        Ok((self.blob(&layer, HOST_LIMITS.component_bytes)?, digest))
    }

    /// The Wasm layer that is meant by a digest.
    fn find(&self, among: &[Descriptor], sha256: &str, depth: u32) -> Result<Option<Descriptor>, Refused> {
        if among.len() > DESCRIPTORS {
            return Err((Fault::Oci, format!("{} manifests; at most {DESCRIPTORS} are read", among.len())));
        }
        for descriptor in among {
            let found = match descriptor.media_type.as_str() {
                INDEX if depth > 0 => {
                    let index: Index = self.json(&self.blob(descriptor, JSON_BYTES)?, "an index")?;
                    self.find(&index.manifests, sha256, depth - 1)?
                }
                MANIFEST => self.layer(descriptor, sha256)?,
                // Of another kind: not ours to understand.
                _ => None,
            };
            if found.is_some() {
                return Ok(found);
            }
        }
        Ok(None)
    }

    fn layer(&self, descriptor: &Descriptor, sha256: &str) -> Result<Option<Descriptor>, Refused> {
        let manifest: Manifest = self.json(&self.blob(descriptor, JSON_BYTES)?, "a manifest")?;
        if manifest.layers.len() > DESCRIPTORS {
            let cause = format!("{} layers; at most {DESCRIPTORS} are read", manifest.layers.len());
            return Err((Fault::Oci, cause));
        }
        let is_meant = descriptor.sha256() == Ok(sha256);
        let mut layers =
            manifest.layers.into_iter().filter(|layer| WASM.contains(&layer.media_type.as_str()));
        if !is_meant {
            return Ok(layers.find(|layer| layer.sha256() == Ok(sha256)));
        }
        match (layers.next(), layers.next()) {
            (Some(layer), None) => Ok(Some(layer)),
            (None, _) => {
                Err((Fault::Oci, format!("the manifest has no layer of type {}", WASM.join(" or "))))
            }
            (Some(_), Some(_)) => Err((Fault::Oci, "the manifest has more than one Wasm layer".into())),
        }
    }

    fn json<T: serde::de::DeserializeOwned>(&self, bytes: &[u8], what: &str) -> Result<T, Refused> {
        serde_json::from_slice(bytes).map_err(|error| (Fault::Oci, format!("{what} can't be read: {error}")))
    }

    /// A blob whose size and digest are what its descriptor says.
    fn blob(&self, descriptor: &Descriptor, most: usize) -> Result<Vec<u8>, Refused> {
        let digits = descriptor.sha256().map_err(|cause| (Fault::Oci, cause))?;
        let bytes = self.read(&format!("blobs/sha256/{digits}"), most)?;
        let is = hex(&Sha256::digest(&bytes));
        if bytes.len() as u64 != descriptor.size || is != digits {
            let cause = format!(
                "blob {digits} has {} bytes and the sha256 {is}; its descriptor says {} bytes",
                bytes.len(),
                descriptor.size
            );
            return Err((Fault::Digest, cause));
        }
        Ok(bytes)
    }

    /// A regular file; links are not followed.
    fn read(&self, name: &str, most: usize) -> Result<Vec<u8>, Refused> {
        let path = self.folder.join(name);
        let missing = |error: &dyn std::fmt::Display| (Fault::Missing, format!("{name}: {error}"));
        // Not blocking: it may be a pipe.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = File::from(open(&path, flags, Mode::empty()).map_err(|error| missing(&error))?);
        if !file.metadata().map_err(|error| missing(&error))?.is_file() {
            return Err(missing(&"it isn't a regular file"));
        }
        let mut bytes = Vec::new();
        file.take(most as u64 + 1).read_to_end(&mut bytes).map_err(|error| missing(&error))?;
        if bytes.len() > most {
            return Err((Fault::Size, format!("{name} has more than {most} bytes")));
        }
        Ok(bytes)
    }
}

fn short(text: &str) -> String {
    text.chars().take(80).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};
    use std::fs;

    struct Folder(tempfile::TempDir);

    impl Folder {
        /// With a component of these bytes in it.
        fn new(component: &[u8]) -> (Self, String, String) {
            let folder = Self(tempfile::tempdir().unwrap());
            fs::create_dir_all(folder.0.path().join("blobs/sha256")).unwrap();
            folder.write("oci-layout", &json!({ "imageLayoutVersion": "1.0.0" }));
            let layer = folder.blob(component);
            let config = folder.blob(b"{}");
            let manifest = json!({
                "schemaVersion": 2, "mediaType": MANIFEST,
                "config": folder.descriptor("application/vnd.wasm.config.v0+json", &config),
                "layers": [folder.descriptor("text/plain", &config), folder.descriptor(WASM[0], &layer)],
            });
            let manifest = folder.blob(manifest.to_string().as_bytes());
            folder.index(&[folder.descriptor(MANIFEST, &manifest)]);
            (folder, layer, manifest)
        }

        fn write(&self, name: &str, value: &Value) {
            fs::write(self.0.path().join(name), value.to_string()).unwrap();
        }

        fn index(&self, manifests: &[Value]) {
            self.write("index.json", &json!({ "schemaVersion": 2, "manifests": manifests }));
        }

        fn path_of(&self, digest: &str) -> std::path::PathBuf {
            self.0.path().join("blobs/sha256").join(digest)
        }

        fn blob(&self, bytes: &[u8]) -> String {
            let digest = hex(&Sha256::digest(bytes));
            fs::write(self.path_of(&digest), bytes).unwrap();
            digest
        }

        fn descriptor(&self, media_type: &str, digest: &str) -> Value {
            let size = fs::metadata(self.path_of(digest)).unwrap().len();
            json!({ "mediaType": media_type, "digest": format!("sha256:{digest}"), "size": size })
        }

        fn code(&self, sha256: &str) -> &'static str {
            component(self.0.path(), sha256).map(|_| ()).unwrap_err().code()
        }
    }

    #[test]
    fn a_component_is_found_by_its_layer_and_by_its_manifest() {
        let (folder, layer, manifest) = Folder::new(b"component");
        for digest in [&layer, &manifest] {
            assert_eq!(component(folder.0.path(), digest).unwrap(), (b"component".to_vec(), layer.clone()));
        }
        // An index in the index, as registries make it for several platforms.
        let index = json!({ "manifests": [folder.descriptor(MANIFEST, &manifest)] });
        let index = folder.blob(index.to_string().as_bytes());
        folder.index(&[folder.descriptor("text/x", &index), folder.descriptor(INDEX, &index)]);
        assert_eq!(component(folder.0.path(), &layer).unwrap().0, b"component");
        assert_eq!(folder.code(&"0".repeat(64)), "policy-oci");
    }

    #[test]
    fn a_blob_that_is_another_is_refused() {
        let (folder, layer, _) = Folder::new(b"component");
        fs::write(folder.path_of(&layer), b"c0mponent").unwrap();
        assert_eq!(folder.code(&layer), "policy-digest");
        fs::write(folder.path_of(&layer), b"component and more").unwrap();
        assert_eq!(folder.code(&layer), "policy-digest");
        fs::remove_file(folder.path_of(&layer)).unwrap();
        assert_eq!(folder.code(&layer), "policy-missing");
        std::os::unix::fs::symlink("/etc/passwd", folder.path_of(&layer)).unwrap();
        assert_eq!(folder.code(&layer), "policy-missing");
    }

    #[test]
    fn hostile_layouts_are_bounded() {
        let (folder, layer, manifest) = Folder::new(b"component");
        let good = folder.descriptor(MANIFEST, &manifest);
        let set = |key: &str, value: Value| {
            let mut descriptor = good.clone();
            descriptor[key] = value;
            descriptor
        };
        for digest in ["sha256:../../../etc/passwd", "md5:00", &format!("sha256:{}", "A".repeat(64))] {
            folder.index(&[set("digest", json!(digest))]);
            assert_eq!(folder.code(&layer), "policy-oci", "{digest}");
        }
        folder.index(&[set("size", json!(u64::MAX))]);
        assert_eq!(folder.code(&layer), "policy-digest");
        folder.index(&vec![good.clone(); DESCRIPTORS + 1]);
        assert_eq!(folder.code(&layer), "policy-oci");
        folder.write("index.json", &json!("x".repeat(JSON_BYTES)));
        assert_eq!(folder.code(&layer), "policy-size");
        fs::write(folder.0.path().join("index.json"), "[".repeat(200_000)).unwrap();
        assert_eq!(folder.code(&layer), "policy-oci");
        folder.write("oci-layout", &json!({ "imageLayoutVersion": "2.0.0" }));
        assert_eq!(folder.code(&layer), "policy-oci");

        let (folder, layer, _) = Folder::new(b"component");
        let huge = json!({ "mediaType": WASM[0], "digest": format!("sha256:{layer}"), "size": u64::MAX });
        let manifest = folder.blob(json!({ "layers": [huge] }).to_string().as_bytes());
        folder.index(&[folder.descriptor(MANIFEST, &manifest)]);
        assert_eq!(folder.code(&manifest), "policy-size");
        let two = vec![folder.descriptor(WASM[1], &layer); 2];
        let manifest = folder.blob(json!({ "layers": two }).to_string().as_bytes());
        folder.index(&[folder.descriptor(MANIFEST, &manifest)]);
        assert_eq!(folder.code(&manifest), "policy-oci", "which of them?");
    }

    #[test]
    fn an_index_that_goes_ever_deeper_ends() {
        let (folder, layer, manifest) = Folder::new(b"component");
        let mut inner = folder.descriptor(MANIFEST, &manifest);
        for _ in 0..=DEPTH {
            let index = folder.blob(json!({ "manifests": [inner] }).to_string().as_bytes());
            inner = folder.descriptor(INDEX, &index);
        }
        folder.index(&[inner]);
        assert_eq!(folder.code(&layer), "policy-oci");
    }
}
