//! Every client with every containerd: what `docs/compatibility.md` says, proven with the real programs. Needs root; every
//! test runs in a sandbox of its own (see `lab::sandbox`).

mod ids;
mod keys;
mod matrix;
mod pods;
mod shared;
mod table;
mod usage;

use lab::sandbox::run_test;
use lab::tools::Release;

macro_rules! releases {
    ($($(#[$attribute:meta])* $name:ident: $release:expr;)*) => {$(
        $(#[$attribute])*
        #[test]
        fn $name() {
            run_test(stringify!($name), |run| matrix::release(run, $release));
        }
    )*};
}

releases! {
    containerd_1_6: Release::V1_6;
    containerd_1_7: Release::V1_7;
    #[ignore = "builds one more containerd: make nightly"]
    containerd_2_0: Release::V2_0;
    #[ignore = "builds one more containerd: make nightly"]
    containerd_2_1: Release::V2_1;
    #[ignore = "builds one more containerd: make nightly"]
    containerd_2_2: Release::V2_2;
    containerd_2_3: Release::V2_3;
    containerd_2_4: Release::V2_4;
}
