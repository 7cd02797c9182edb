//! gRPC schemas and their generated code: containerd's Snapshots service (served and called), those of containerd's other
//! services that are called, the cluster's control, mesh, enrolment and grant services (both) and the status services of node and seeder (both).

#![allow(missing_docs, reason = "generated; the .proto files carry the comments")]
#![allow(unreachable_pub, clippy::all, reason = "generated")]

pub mod containerd {
    pub mod types {
        tonic::include_proto!("containerd.types");
    }
    pub mod services {
        pub mod snapshots {
            pub mod v1 {
                tonic::include_proto!("containerd.services.snapshots.v1");
            }
        }
        pub mod content {
            pub mod v1 {
                tonic::include_proto!("containerd.services.content.v1");
            }
        }
        pub mod images {
            pub mod v1 {
                tonic::include_proto!("containerd.services.images.v1");
            }
        }
        pub mod leases {
            pub mod v1 {
                tonic::include_proto!("containerd.services.leases.v1");
            }
        }
        pub mod diff {
            pub mod v1 {
                tonic::include_proto!("containerd.services.diff.v1");
            }
        }
        pub mod version {
            pub mod v1 {
                tonic::include_proto!("containerd.services.version.v1");
            }
        }
        pub mod introspection {
            pub mod v1 {
                tonic::include_proto!("containerd.services.introspection.v1");
            }
        }
    }
}

pub mod drover {
    pub mod control {
        pub mod v1 {
            tonic::include_proto!("drover.control.v1");
        }
    }
    pub mod enrol {
        pub mod v1 {
            tonic::include_proto!("drover.enrol.v1");
        }
    }
    pub mod grant {
        pub mod v1 {
            tonic::include_proto!("drover.grant.v1");
        }
    }
    pub mod mesh {
        pub mod v1 {
            tonic::include_proto!("drover.mesh.v1");
        }
    }
    pub mod node {
        pub mod v1 {
            tonic::include_proto!("drover.node.v1");
        }
    }
    pub mod seeder {
        pub mod v1 {
            tonic::include_proto!("drover.seeder.v1");
        }
    }
}

#[cfg(test)]
mod pinned;
