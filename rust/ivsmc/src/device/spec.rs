//! Device specs: how people name a device.
//!
//! | spec | device |
//! | --- | --- |
//! | `vfio:0000:00:05.0` | an ivshmem-doorbell device of this guest, through VFIO |
//! | `agent:/run/ivsmc/agent.sock` | the same, owned by an agent |
//! | `host:/run/ivsmc/ivs0.sock` | the region of an ivshmem server, by its socket |
//! | `pci:0000:00:05.0` | an ivshmem device of this guest, without interrupts |
//! | `local` | the private region of this user, made on first use |
//! | `file:/path` | a shared file |

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use ivsmc_shm::pci::Address;

use crate::{Error, Result};

/// What a device is. In the order of preference: the fastest wake-up first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// An ivshmem-doorbell device of this guest, through VFIO.
    Vfio,
    /// An ivshmem-doorbell device of this guest that an agent owns, reached through its socket.
    Agent,
    /// The region of an ivshmem server, reached through its socket.
    Host,
    /// An ivshmem device of this guest, without interrupts.
    Pci,
    /// The embedded default: a private region of this user.
    Local,
    /// A shared file.
    File,
}

impl Kind {
    /// The word a spec of this kind starts with.
    pub fn name(self) -> &'static str {
        match self {
            Self::Vfio => "vfio",
            Self::Agent => "agent",
            Self::Host => "host",
            Self::Pci => "pci",
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
    place: Place,
    text: String,
}

/// Where a device is; in the order of [`Kind`].
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Place {
    /// A PCI function.
    Vfio(Address),
    /// An absolute path.
    Agent(PathBuf),
    /// An absolute path.
    Host(PathBuf),
    /// A PCI function.
    Pci(Address),
    /// Where the environment says.
    Local,
    /// An absolute path.
    File(PathBuf),
}

impl Place {
    fn kind(&self) -> Kind {
        match self {
            Self::Vfio(_) => Kind::Vfio,
            Self::Agent(_) => Kind::Agent,
            Self::Host(_) => Kind::Host,
            Self::Pci(_) => Kind::Pci,
            Self::Local => Kind::Local,
            Self::File(_) => Kind::File,
        }
    }
}

/// What a spec may look like, for error messages.
const FORMS: &str = "a device is \"local\", \"file:/path/of/a/shared/file\", \
     \"host:/path/of/an/ivshmem/server.sock\", in a guest \"vfio:0000:00:05.0\" or \
     \"pci:0000:00:05.0\" with the PCI address of an ivshmem device or \
     \"agent:/path/of/its/agent.sock\", several of them separated by commas, or \"none\" to use \
     TCP only";

impl DeviceSpec {
    /// The embedded default.
    pub(crate) fn local() -> Self {
        Self::new(Place::Local)
    }

    /// The ivshmem server that listens at `socket`.
    pub(crate) fn host(socket: &Path) -> Self {
        Self::new(Place::Host(absolute(socket)))
    }

    /// The guest's device at `address`, through VFIO.
    pub(crate) fn vfio(address: Address) -> Self {
        Self::new(Place::Vfio(address))
    }

    /// The guest's device at `address`, without VFIO.
    pub(crate) fn pci(address: Address) -> Self {
        Self::new(Place::Pci(address))
    }

    /// The guest's device that the agent owns that listens at `socket`.
    pub(crate) fn agent(socket: &Path) -> Self {
        Self::new(Place::Agent(absolute(socket)))
    }

    fn new(place: Place) -> Self {
        let kind = place.kind();
        let text = match &place {
            Place::Vfio(address) | Place::Pci(address) => format!("{kind}:{address}"),
            Place::Agent(path) | Place::Host(path) | Place::File(path) => {
                format!("{kind}:{}", path.display())
            }
            Place::Local => kind.to_string(),
        };
        Self { place, text }
    }

    pub(crate) fn kind(&self) -> Kind {
        self.place.kind()
    }

    /// Where the device is.
    pub(crate) fn place(&self) -> &Place {
        &self.place
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
        let Some(path) = path else {
            return match word {
                "local" => Ok(Self::local()),
                "none" => Err(Error::device(
                    text,
                    "\"none\" switches shared memory off and cannot stand beside other devices",
                )),
                "" => Err(Error::device("", format!("no device is named; {FORMS}"))),
                _ => Err(Error::device(text, format!("not a device; {FORMS}"))),
            };
        };
        if path.contains('\0') {
            let shown = text.replace('\0', "\\0");
            return Err(Error::device(shown, "the path contains a null character"));
        }
        let path_of = |place: fn(PathBuf) -> Place| {
            if path.is_empty() {
                return Err(Error::device(text, format!("no path after \"{word}:\"; {FORMS}")));
            }
            Ok(Self::new(place(absolute(Path::new(path)))))
        };
        let address_of = |place: fn(Address) -> Place| {
            path.parse().map(|address| Self::new(place(address))).map_err(|()| {
                Error::device(text, format!("no PCI address after \"{word}:\"; {FORMS}"))
            })
        };
        match word {
            "vfio" => address_of(Place::Vfio),
            "host" => path_of(Place::Host),
            "pci" => address_of(Place::Pci),
            "file" => path_of(Place::File),
            "local" => Err(Error::device(text, format!("\"local\" takes no path; {FORMS}"))),
            "agent" => path_of(Place::Agent),
            _ => Err(Error::device(text, format!("not a device; {FORMS}"))),
        }
    }
}

/// The path from the root.
fn absolute(path: &Path) -> PathBuf {
    // Fails only for an empty path, which `from_str` refuses, or without a working directory,
    // where a relative path does not open either.
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
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
        assert_eq!(file.place(), &Place::File("/dev/shm/region".into()));
        let host: DeviceSpec = " host:/run/ivsmc/ivs0.sock ".parse().unwrap();
        assert_eq!((host.kind(), host.as_str()), (Kind::Host, "host:/run/ivsmc/ivs0.sock"));
        let agent: DeviceSpec = "agent:/run/ivsmc/agent-0000:00:05.0.sock".parse().unwrap();
        assert_eq!(agent.place(), &Place::Agent("/run/ivsmc/agent-0000:00:05.0.sock".into()));
        assert_eq!(agent.kind(), Kind::Agent);
        let vfio: DeviceSpec = "vfio:0000:00:05.0".parse().unwrap();
        assert_eq!((vfio.kind(), vfio.as_str()), (Kind::Vfio, "vfio:0000:00:05.0"));
        let pci: DeviceSpec = "pci:0A:1f.7".parse().unwrap();
        assert_eq!((pci.kind(), pci.as_str()), (Kind::Pci, "pci:0000:0a:1f.7"));
        assert_eq!("vfio:00:05.0".parse::<DeviceSpec>().unwrap(), vfio);
    }

    #[test]
    fn a_relative_path_names_the_same_device_from_anywhere() {
        let file: DeviceSpec = "file:region".parse().unwrap();
        assert!(file.as_str().starts_with("file:/"));
    }

    #[test]
    fn a_list_is_sorted_by_wake_up_and_has_no_doubles() {
        let specs =
            DeviceSpec::parse_list("file:/a, pci:00:05.0,local,host:/s,file:/a,vfio:00:06.0")
                .unwrap();
        let texts: Vec<_> = specs.iter().map(DeviceSpec::as_str).collect();
        let sorted = ["vfio:0000:00:06.0", "host:/s", "pci:0000:00:05.0", "local", "file:/a"];
        assert_eq!(texts, sorted);
        assert!(DeviceSpec::parse_list("none").unwrap().is_empty());
    }

    #[test]
    fn bad_specs_say_what_they_are_and_which_there_are() {
        for text in ["", "loca", "local:/x", "file", "file:", "host:", "http://x", "local,", ":"] {
            let words = refusal(text);
            assert!(words.contains("file:/path"), "{text}: {words}");
        }
        for text in ["vfio:", "pci:5", "vfio:/dev/vfio/7", "pci:0000:00:05.9"] {
            let words = refusal(text);
            assert!(words.contains("no PCI address") && words.contains("vfio:0000:"), "{words}");
        }
        assert!(refusal("local,none").contains("cannot stand beside"));
        assert!(refusal("file:/a\0b").contains("null character"));
    }
}
