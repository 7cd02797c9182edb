//! The releases of containerd that Drover is tested with.

/// A minor release of containerd.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Release {
    /// 1.6, from the distribution's package.
    V1_6,
    /// 1.7.
    V1_7,
    /// 2.0.
    V2_0,
    /// 2.1.
    V2_1,
    /// 2.2.
    V2_2,
    /// 2.3.
    V2_3,
    /// 2.4.
    V2_4,
}

impl Release {
    /// All of them, the oldest first.
    pub const ALL: [Self; 7] = [Self::V1_6, Self::V1_7, Self::V2_0, Self::V2_1, Self::V2_2, Self::V2_3, Self::V2_4];

    /// What everything that is not about releases runs on.
    pub const DEFAULT: Self = Self::V2_3;

    /// Like `2.3`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::V1_6 => "1.6",
            Self::V1_7 => "1.7",
            Self::V2_0 => "2.0",
            Self::V2_1 => "2.1",
            Self::V2_2 => "2.2",
            Self::V2_3 => "2.3",
            Self::V2_4 => "2.4",
        }
    }

    /// Whether its configuration is of version 3; the releases before know version 2.
    pub fn has_version_3(self) -> bool {
        self >= Self::V2_0
    }

    /// Folder of `integration/tools` that pins it.
    pub(super) const fn module(self) -> &'static str {
        match self {
            Self::V1_6 => "containerd-1.6",
            Self::V1_7 => "containerd-1.7",
            Self::V2_0 => "containerd-2.0",
            Self::V2_1 => "containerd-2.1",
            Self::V2_2 => "containerd-2.2",
            Self::V2_3 => "containerd-2.3",
            Self::V2_4 => "containerd-2.4",
        }
    }
}
