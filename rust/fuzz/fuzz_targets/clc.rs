//! The CLC codec: no bytes make it panic, and what it understood it says again in the same meaning.
#![no_main]

use ivsmc_proto::clc::{self, Eid, Message, HEADER_LENGTH};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let length = bytes.first_chunk::<HEADER_LENGTH>().map(clc::expected_length);
    let message = match clc::decode(bytes) {
        Ok(message) => message,
        Err(wrong) => return assert!(wrong.to_string().starts_with("CLC ")),
    };
    assert_eq!(length, Some(Ok(bytes.len())));
    assert_eq!(message.kind().0, bytes[4]);
    let again = match &message {
        Message::Proposal(proposal) => {
            // As whoever answers it does.
            let chosen = proposal.choose_eid(&[Eid::DEFAULT]);
            assert!(chosen.is_none_or(|eid| proposal.eids.contains(&eid)));
            proposal.encode()
        }
        Message::Accept(accept) => accept.encode_accept(),
        Message::Confirm(confirm) => confirm.encode_confirm(),
        Message::Decline(decline) => decline.encode(),
        Message::Unsupported { .. } => return,
    };
    assert_eq!(clc::decode(&again), Ok(message));
});
