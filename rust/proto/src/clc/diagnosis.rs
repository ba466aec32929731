//! Why a session is not SMC: the codes of Decline and fallback.

use core::fmt;

/// A diagnosis code of SMC (`smc_clc.h`; texts after `smcss(8)`).
#[derive(Copy, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Diagnosis(pub u32);

macro_rules! diagnoses {
    ($($name:ident = $code:literal, $text:literal;)*) => {
        impl Diagnosis {
            $(
                #[doc = $text]
                pub const $name: Diagnosis = Diagnosis($code);
            )*

            /// Every code known here.
            pub const ALL: &'static [Diagnosis] = &[$(Diagnosis::$name),*];

            /// SMC's name of the code.
            #[must_use]
            pub const fn name(self) -> Option<&'static str> {
                match self {
                    $(Diagnosis::$name => Some(stringify!($name)),)*
                    _ => None,
                }
            }

            /// What the code means.
            #[must_use]
            pub const fn text(self) -> &'static str {
                match self {
                    $(Diagnosis::$name => $text,)*
                    _ => "unknown diagnosis code",
                }
            }
        }
    };
}

diagnoses! {
    MEM = 0x0101_0000, "insufficient memory";
    TIMEOUT_CL = 0x0201_0000, "timeout while confirming the link";
    TIMEOUT_AL = 0x0202_0000, "timeout while adding a link";
    CNFERR = 0x0300_0000, "configuration error";
    PEERNOSMC = 0x0301_0000, "the peer does not speak SMC";
    IPSEC = 0x0302_0000, "the connection uses IPsec";
    NOSMCDEV = 0x0303_0000, "no SMC device found";
    NOSMCDDEV = 0x0303_0001, "no SMC-D device found";
    NOSMCRDEV = 0x0303_0002, "no SMC-R device found";
    NOISM2SUPP = 0x0303_0003, "no ISMv2 support";
    NOV2EXT = 0x0303_0004, "the version 2 extension is missing";
    NOV2DEXT = 0x0303_0005, "the SMC-Dv2 extension is missing";
    NOSEID = 0x0303_0006, "no system EID";
    NOSMCD2DEV = 0x0303_0007, "no matching SMC-Dv2 device";
    NOUEID = 0x0303_0008, "no common user EID";
    RELEASEERR = 0x0303_0009, "SMC release negotiation failed";
    MAXCONNERR = 0x0303_000A, "negotiation of the connections of a link failed";
    MAXLINKERR = 0x0303_000B, "negotiation of the links of a group failed";
    MODEUNSUPP = 0x0304_0000, "the chosen mode was not offered";
    RMBE_EC = 0x0305_0000, "an eyecatcher in a receive buffer element";
    OPTUNSUPP = 0x0306_0000, "TCP fast open is not supported";
    DIFFPREFIX = 0x0307_0000, "the IP prefixes differ";
    GETVLANERR = 0x0308_0000, "the VLAN id could not be found out";
    ISMVLANERR = 0x0309_0000, "the VLAN id could not be registered with the device";
    NOACTLINK = 0x030A_0000, "no active link in the link group";
    NOSRVLINK = 0x030B_0000, "the link of the listening side was not found";
    VERSMISMAT = 0x030C_0000, "the SMC versions do not match";
    MAX_DMB = 0x030D_0000, "the device has no DMB left";
    NOROUTE = 0x030E_0000, "no route to the peer's device";
    NOINDIRECT = 0x030F_0000, "the peer's device is only reachable indirectly";
    SYNCERR = 0x0400_0000, "the link groups are out of step";
    PEERDECL = 0x0500_0000, "the peer declined during the handshake";
    INTERR = 0x0999_0000, "internal error";
    ERR_RTOK = 0x0999_0001, "internal error: handling of a memory key failed";
    ERR_RDYLNK = 0x0999_0002, "internal error: the link could not be made ready";
    ERR_REGBUF = 0x0999_0003, "internal error: a buffer could not be registered";
}

impl fmt::Display for Diagnosis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => write!(f, "{name} (0x{:08x}): {}", self.0, self.text()),
            None => write!(f, "0x{:08x}: {}", self.0, self.text()),
        }
    }
}

impl fmt::Debug for Diagnosis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Diagnosis(0x{:08x} {})", self.0, self.name().unwrap_or("?"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::ToString;

    #[test]
    fn codes_are_ordered_and_named() {
        // Ordered as in the table of smc_clc.h, so also without doubles.
        assert!(Diagnosis::ALL.windows(2).all(|two| two[0] < two[1]));
        for diagnosis in Diagnosis::ALL {
            assert!(diagnosis.name().is_some(), "{diagnosis}");
        }
    }

    #[test]
    fn shows_name_code_and_text() {
        assert_eq!(
            Diagnosis::NOSMCD2DEV.to_string(),
            "NOSMCD2DEV (0x03030007): no matching SMC-Dv2 device"
        );
        assert_eq!(Diagnosis(0x7777_0000).to_string(), "0x77770000: unknown diagnosis code");
    }
}
