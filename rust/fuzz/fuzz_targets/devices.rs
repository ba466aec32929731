//! Device specs: a list, or words about what is wrong; and what is shown names the same.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|list: &str| {
    match ivsmc::fuzzing::device_list(list) {
        Ok(specs) => {
            for spec in &specs {
                // A path may end in blanks, which a list does not keep.
                if spec.trim() == spec {
                    let again = ivsmc::fuzzing::device_list(spec);
                    assert_eq!(again.ok().as_deref(), Some(std::slice::from_ref(spec)));
                }
            }
            assert!(specs.len() <= list.split(',').count());
        }
        Err(wrong) => assert!(!wrong.to_string().is_empty()),
    }
});
