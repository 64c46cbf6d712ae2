//! Tunnels to internal addresses, in every state that an interface can be in.

use egress_agent::datapath::Action;
use egress_common::{
    reason::Reason,
    records::{
        INTERFACE_SETTLING, INTERFACE_SOURCES, MODE_ENFORCE, POLICY_ALLOW_INTERNAL, POLICY_OPEN,
        POLICY_UNIDENTIFIED,
    },
};
use egress_tests::{
    addresses::{server, server6},
    programs::{ANYTHING, INTERNAL, Programs, VXLAN},
    raw::{flag, protocol},
};

/// Packets that carry others, to an internal address of each family.
fn tunnels(programs: &Programs) -> Vec<Vec<u8>> {
    let mut frames = Vec::new();
    for internal in INTERNAL {
        let to = programs.to(internal);
        let inner = programs.to(server(66)).packet(protocol::UDP, &[0; 16]);
        frames.push(to.udp(7, VXLAN, &inner));
        for kind in [
            protocol::IPIP,
            protocol::IPV6,
            protocol::GRE,
            protocol::ESP,
            protocol::UDP_LITE,
        ] {
            frames.push(to.frame(kind, &inner));
        }
        frames.push(to.fragment(9, 0, true).frame(protocol::GRE, &inner));
    }
    frames
}

#[track_caller]
fn no_tunnel_leaves(programs: &mut Programs) {
    for frame in tunnels(programs) {
        programs.stays(&frame, Reason::Tunnel);
    }
}

#[test]
fn no_tunnel_leaves_an_open_pod() {
    let mut programs = Programs::new();
    programs.change_policy(|policy| {
        policy.flags |= POLICY_OPEN | POLICY_ALLOW_INTERNAL;
        policy.any = ANYTHING;
    });
    for internal in INTERNAL {
        programs.allow(internal, ANYTHING, u64::MAX);
    }
    no_tunnel_leaves(&mut programs);
    for internal in INTERNAL {
        programs.leaves(&programs.to(internal).udp(7, VXLAN + 1, b"no tunnel"));
    }
    // Outside there is no node of the cluster.
    for outside in [server(1), server6(1)] {
        programs.leaves(&programs.to(outside).frame(protocol::GRE, &[0; 16]));
    }
}

#[test]
fn no_tunnel_leaves_while_a_pod_begins_to_be_enforced() {
    for flags in [INTERFACE_SOURCES | INTERFACE_SETTLING, INTERFACE_SOURCES] {
        let mut programs = Programs::new();
        programs.set_interface(|interface| interface.flags = flags);
        no_tunnel_leaves(&mut programs);
        // Nothing else is judged but its source.
        for internal in INTERNAL {
            programs.leaves(&programs.to(internal).udp(7, VXLAN + 1, b"no tunnel"));
        }
        programs.leaves(&programs.to(server(9)).tcp(7, 9, flag::SYN));
    }
}

#[test]
fn no_tunnel_leaves_while_the_pod_of_an_interface_is_unknown() {
    let mut programs = Programs::new();
    // As with a configuration that lets internal addresses pass.
    programs.change_policy(|policy| policy.flags |= POLICY_UNIDENTIFIED | POLICY_ALLOW_INTERNAL);
    no_tunnel_leaves(&mut programs);
    for internal in INTERNAL {
        programs.leaves(&programs.to(internal).udp(7, VXLAN + 1, b"no tunnel"));
    }
    programs.stays(
        &programs.to(server(9)).frame(protocol::GRE, &[0; 16]),
        Reason::PodUnknown,
    );
    // Not even the addresses of the pod are known.
    programs.change_policy(|policy| policy.own_len = 0);
    for frame in tunnels(&programs) {
        programs.stays(&frame, Reason::PodUnknown);
    }
}

#[test]
fn in_audit_mode_a_tunnel_leaves_and_its_contents_open_no_flow() {
    for (internal, caller) in INTERNAL.into_iter().zip([server(9), server6(9)]) {
        for is_vxlan in [true, false] {
            let mut programs = Programs::new();
            programs.audit();
            let to = programs.to(internal);
            let frame = if is_vxlan {
                to.udp(7, VXLAN, &[0; 16])
            } else {
                to.frame(protocol::GRE, &[0; 16])
            };
            let outcome = programs.sends(&frame);
            assert_eq!(outcome.run.action, Action::Pass, "{internal}");
            outcome.reported(Reason::Tunnel);
            // The node would unpack it and send this back, in whose name the pod likes.
            let by = programs.by(caller);
            programs.arrives(&by.udp(5000, 8080, b"called"));
            programs.arrives(&by.tcp(5000, 8080, flag::SYN));
            programs.set_interface(|interface| interface.mode = MODE_ENFORCE);
            let answer = programs.to(caller);
            programs.stays(&answer.udp(8080, 5000, b"stolen"), Reason::NoRule);
            let accepts = answer.tcp(8080, 5000, flag::SYN | flag::ACK);
            programs.stays(&accepts, Reason::NoRule);
        }
    }
}
