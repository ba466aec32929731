//! Peer slots for operators: who has them, and the word that one is dead.

use std::net::IpAddr;

use ivsmc_proto::slot::{Prover, SlotRef, SlotState};

use crate::attachment::Attachment;
use crate::{Error, Result};

/// What is known of a peer slot in use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotReport {
    /// Index and generation.
    pub index: u16,
    /// Which owner of the index it is.
    pub generation: u32,
    /// Its owner is alive as far as anyone knows; else it is dead and being reclaimed.
    pub is_live: bool,
    /// It is this process's own.
    pub is_own: bool,
    /// Who may say that its owner is dead: `lock`, `ivposition`, `agent`, `vfio` or `none`.
    pub prover: &'static str,
    /// The id that goes with it.
    pub prover_id: Option<u32>,
    /// The id of its device at the ivshmem server.
    pub ivposition: Option<u16>,
    /// The vector it is notified on.
    pub vector: Option<u16>,
    /// Whether it runs in this boot of this machine, if both know their boot and its owner has said.
    pub is_same_boot: Option<bool>,
    /// Whether it runs on this machine, if both uuids are known.
    pub is_same_machine: Option<bool>,
    /// Addresses of its host.
    pub addresses: Vec<IpAddr>,
}

impl SlotReport {
    /// Its name, "index.generation".
    #[must_use]
    pub fn name(&self) -> String {
        SlotRef { index: self.index, generation: self.generation }.to_string()
    }
}

/// The slots in use.
pub(crate) fn report(attachment: &Attachment) -> Vec<SlotReport> {
    let region = attachment.region();
    let of = |(index, state)| {
        let (at, prover, is_live) = match state {
            SlotState::Free { .. } => return None,
            SlotState::Live { at, prover } => (at, prover, true),
            SlotState::Dead { at, prover } => (at, prover, false),
        };
        let (prover, prover_id) = match prover {
            Prover::Lock { boot } => ("lock", Some(boot)),
            Prover::IvPosition(id) => ("ivposition", Some(id.into())),
            Prover::Agent(id) => ("agent", Some(id)),
            Prover::VfioExclusive(id) => ("vfio", Some(id)),
            Prover::None => ("none", None),
        };
        let info = region.slot_info(at);
        let (boot, ours) = (region.boot_of(at), attachment.boot());
        let record = region.host_record(index);
        let addresses = record.as_ref().map_or(&[][..], |record| record.addresses());
        Some(SlotReport {
            index,
            generation: at.generation,
            is_live,
            is_own: at == attachment.me(),
            prover,
            prover_id,
            ivposition: info.and_then(|info| info.ivposition),
            vector: info.and_then(|info| info.vector),
            is_same_boot: boot.and_then(|boot| boot.is_same(ours)),
            is_same_machine: boot.and_then(|boot| boot.is_of_same_machine(ours)),
            addresses: addresses.iter().map(|ip| IpAddr::from(*ip)).collect(),
        })
    };
    region.slots().filter_map(of).collect()
}

/// Declares the slot named `name` dead, and reclaims it.
pub(crate) fn declare_dead(attachment: &Attachment, name: &str) -> Result<bool> {
    let at = parse(name)
        .filter(|at| at.index < attachment.region().geometry().slots())
        .ok_or_else(|| {
            Error::ApiMisuse(format!(
                "\"{name}\" is no slot of this region; name it as \"index.generation\", as slots are \
                 listed"
            ))
        })?;
    if at == attachment.me() {
        return Err(Error::ApiMisuse(format!("slot {at} is this process's own; close the device")));
    }
    let region = attachment.region();
    let is_in_use = region.claimed().any(|(found, _)| found == at);
    region.reclaim(at);
    attachment.sweep();
    Ok(is_in_use)
}

fn parse(name: &str) -> Option<SlotRef> {
    let (index, generation) = name.split_once('.')?;
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    if !is_number(index) || !is_number(generation) {
        return None;
    }
    Some(SlotRef { index: index.parse().ok()?, generation: generation.parse().ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::tests::{spec, Scratch};
    use crate::device::Kind;

    #[test]
    fn an_operators_word_gives_back_what_nobody_can_prove() {
        let scratch = Scratch::new();
        let path = scratch.file("region", 2 << 20);
        let attachment = Attachment::open(&spec(Kind::File, &path)).unwrap();
        let region = attachment.region();
        // Another machine's, that is gone for good.
        let gone = region.claim_slot(9, Prover::VfioExclusive(3)).unwrap();
        let extent = region.claim_extent(gone).unwrap();
        assert!(region.open_extent(extent, gone));
        let slots = report(&attachment);
        assert_eq!(slots.len(), 2);
        let [ours, theirs] = &slots[..] else { unreachable!() };
        assert!(ours.is_own && ours.is_live && ours.is_same_boot == Some(true));
        assert_eq!((ours.prover, ours.ivposition, ours.vector), ("lock", None, None));
        assert_eq!(ours.name(), attachment.me().to_string());
        assert!(!theirs.is_own && theirs.is_live && theirs.is_same_boot.is_none());
        assert_eq!((theirs.prover, theirs.prover_id), ("vfio", Some(3)));
        assert!(theirs.addresses.is_empty());
        assert_eq!(attachment.reap(), 0);

        for wrong in ["", "9", "9.", ".1", "9.1.1", "+9.1", "9.-1", "99999.1", "1000.1", "a.b"] {
            let refused = declare_dead(&attachment, wrong);
            assert!(matches!(refused, Err(Error::ApiMisuse(_))), "{wrong}");
        }
        let own = declare_dead(&attachment, &attachment.me().to_string());
        assert!(matches!(own, Err(Error::ApiMisuse(_))));
        assert!(!declare_dead(&attachment, "9.2").unwrap(), "another generation is nobody's");
        assert!(region.is_live(gone));
        assert!(declare_dead(&attachment, "9.1").unwrap());
        assert!(!declare_dead(&attachment, "9.1").unwrap());
        assert_eq!((attachment.census().live, attachment.census().extents), (1, 0));
    }
}
