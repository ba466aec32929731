//! The frames after the handshake: the same wakes, however the stream is cut, and no more than there are.
#![no_main]

use ivsmc_fuzz::Input;
use ivsmc_proto::frame::{FrameDecoder, WAKE};
use libfuzzer_sys::fuzz_target;

/// WAKE frames in `stream`, and whether it ends between two frames.
fn frames(mut stream: &[u8]) -> (usize, bool) {
    let mut wakes = 0;
    loop {
        stream = match stream {
            [] => return (wakes, true),
            [0..=0x7f, rest @ ..] => {
                wakes += usize::from(stream[0] == WAKE);
                rest
            }
            [_, high, low, rest @ ..] => {
                match rest.get(usize::from(u16::from_be_bytes([*high, *low]))..) {
                    Some(rest) => rest,
                    None => return (wakes, false),
                }
            }
            _ => return (wakes, false),
        };
    }
}

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input::new(bytes);
    let cuts = input.bytes(8).to_vec();
    let stream = input.rest();
    let expected = frames(stream);
    let mut decoder = FrameDecoder::new();
    let (mut rest, mut wakes) = (stream, 0);
    for cut in cuts.iter().cycle() {
        let (piece, more) = rest.split_at(usize::from(*cut).min(rest.len()));
        wakes += decoder.push(piece);
        rest = more;
        // Pieces of no bytes alone would be no end of the stream.
        if rest.is_empty() || cuts.iter().all(|cut| *cut == 0) {
            break;
        }
    }
    wakes += decoder.push(rest);
    assert_eq!((wakes, decoder.is_between_frames()), expected);
});
