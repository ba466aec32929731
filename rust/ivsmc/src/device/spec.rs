//! Device specs: how people name a device.
//!
//! | spec | device |
//! | --- | --- |
//! | `host:/run/ivsmc/ivs0.sock` | the region of an ivshmem server, by its socket |
//! | `local` | the private region of this user, made on first use |
//! | `file:/path` | a shared file |

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::{Error, Result};

/// What a device is. In the order of preference: the fastest wake-up first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// The region of an ivshmem server, reached through its socket.
    Host,
    /// The embedded default: a private region of this user.
    Local,
    /// A shared file.
    File,
}

impl Kind {
    /// The word a spec of this kind starts with.
    pub fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Local => "local",
            Self::File => "file",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A well-formed device spec; two that are equal name the same device.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct DeviceSpec {
    kind: Kind,
    /// Absolute; empty for `local`.
    path: PathBuf,
    text: String,
}

/// What a spec may look like, for error messages.
const FORMS: &str = "a device is \"local\", \"file:/path/of/a/shared/file\", \
     \"host:/path/of/an/ivshmem/server.sock\", several of them separated by commas, or \"none\" \
     to use TCP only";

impl DeviceSpec {
    /// The embedded default.
    pub(crate) fn local() -> Self {
        Self { kind: Kind::Local, path: PathBuf::new(), text: Kind::Local.name().into() }
    }

    /// The ivshmem server that listens at `socket`.
    pub(crate) fn host(socket: &Path) -> Self {
        Self::at(Kind::Host, socket)
    }

    fn at(kind: Kind, path: &Path) -> Self {
        // Fails only for an empty path, which `from_str` refuses, or without a working directory,
        // where a relative path does not open either.
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        let text = format!("{kind}:{}", path.display());
        Self { kind, path, text }
    }

    pub(crate) fn kind(&self) -> Kind {
        self.kind
    }

    /// The file or socket; empty for `local`.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.text
    }

    /// Parses a comma list; `Ok` with nothing in it for `none`.
    ///
    /// # Errors
    /// [`Error::Device`] naming the part that is no spec, and the forms there are.
    pub(crate) fn parse_list(list: &str) -> Result<Vec<Self>> {
        if list.trim() == "none" {
            return Ok(Vec::new());
        }
        let mut specs = Vec::new();
        for part in list.split(',') {
            let spec: Self = part.parse()?;
            if !specs.contains(&spec) {
                specs.push(spec);
            }
        }
        specs.sort_by_key(Self::kind);
        Ok(specs)
    }
}

impl FromStr for DeviceSpec {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let text = text.trim();
        let (word, path) = match text.split_once(':') {
            Some((word, path)) => (word, Some(path)),
            None => (text, None),
        };
        let kind = match (word, path) {
            ("local", None) => return Ok(Self::local()),
            ("host", Some(_)) => Kind::Host,
            ("file", Some(_)) => Kind::File,
            ("local", Some(_)) => {
                return Err(Error::device(text, format!("\"local\" takes no path; {FORMS}")))
            }
            ("none", None) => {
                return Err(Error::device(
                    text,
                    "\"none\" switches shared memory off and cannot stand beside other devices",
                ))
            }
            ("vfio" | "pci" | "agent", Some(_)) => {
                return Err(Error::device(
                    text,
                    format!("this version has no {word}: devices; {FORMS}"),
                ))
            }
            ("", None) => return Err(Error::device("", format!("no device is named; {FORMS}"))),
            _ => return Err(Error::device(text, format!("not a device; {FORMS}"))),
        };
        match path {
            Some(path) if path.contains('\0') => {
                Err(Error::device(text.replace('\0', "\\0"), "the path contains a null character"))
            }
            Some(path) if !path.is_empty() => Ok(Self::at(kind, Path::new(path))),
            _ => Err(Error::device(text, format!("no path after \"{kind}:\"; {FORMS}"))),
        }
    }
}

impl fmt::Display for DeviceSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(text: &str) -> String {
        DeviceSpec::parse_list(text).expect_err(text).to_string()
    }

    #[test]
    fn every_form_parses() {
        let local: DeviceSpec = "local".parse().unwrap();
        assert_eq!((local.kind(), local.as_str()), (Kind::Local, "local"));
        let file: DeviceSpec = "file:/dev/shm/region".parse().unwrap();
        assert_eq!(file.kind(), Kind::File);
        assert_eq!(file.path(), Path::new("/dev/shm/region"));
        let host: DeviceSpec = " host:/run/ivsmc/ivs0.sock ".parse().unwrap();
        assert_eq!((host.kind(), host.as_str()), (Kind::Host, "host:/run/ivsmc/ivs0.sock"));
    }

    #[test]
    fn a_relative_path_names_the_same_device_from_anywhere() {
        let file: DeviceSpec = "file:region".parse().unwrap();
        assert!(file.path().is_absolute());
        assert!(file.as_str().starts_with("file:/"));
    }

    #[test]
    fn a_list_is_sorted_by_wake_up_and_has_no_doubles() {
        let specs = DeviceSpec::parse_list("file:/a, local,host:/s,file:/a").unwrap();
        let texts: Vec<_> = specs.iter().map(DeviceSpec::as_str).collect();
        assert_eq!(texts, ["host:/s", "local", "file:/a"]);
        assert!(DeviceSpec::parse_list("none").unwrap().is_empty());
    }

    #[test]
    fn bad_specs_say_what_they_are_and_which_there_are() {
        for text in ["", "loca", "local:/x", "file", "file:", "host:", "http://x", "local,", ":"] {
            let words = refusal(text);
            assert!(words.contains("file:/path"), "{text}: {words}");
        }
        assert!(refusal("vfio:0000:00:05.0").contains("no vfio: devices"));
        assert!(refusal("local,none").contains("cannot stand beside"));
        assert!(refusal("file:/a\0b").contains("null character"));
    }
}
