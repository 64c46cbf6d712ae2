//! Set-ups that many tests begin with.

use crate::{Agent, Lab, Pod, TcpEcho, addresses::server};

/// Names of the pods of [`Lab::two_pods_on_a_bridge`].
const ON_BRIDGE: [&str; 2] = ["cart", "mail"];

/// The pod `shop/cart`, which may reach `shop.test`, a server there, and the agent that enforces the pod's policy.
#[derive(Debug)]
pub struct Shop {
    /// The agent. It is dropped first.
    pub agent: Agent,
    /// The server on port 443 of every outside address.
    pub web: TcpEcho,
    /// The pod.
    pub pod: Pod,
    /// The laboratory.
    pub lab: Lab,
}

impl Shop {
    /// Starts the agent with these arguments. The pod has this `allow` annotation.
    #[track_caller]
    pub fn start(lab: Lab, allow: &str, arguments: &[&str]) -> Self {
        let (web, pod) = lab.shop_and_cart(allow);
        let agent = lab.start_agent_with(arguments, &[&pod]);
        Self {
            agent,
            web,
            pod,
            lab,
        }
    }
}

impl Lab {
    /// `shop.test` with one address, a server on port 443, and the pod `shop/cart` with this `allow` annotation.
    #[track_caller]
    pub fn shop_and_cart(&self, allow: &str) -> (TcpEcho, Pod) {
        let web = self.serve_tcp(443);
        self.dns().addresses("shop.test", &[server(10)]);
        let pod = self.pod("shop", "cart");
        self.write_pod(&pod, &[("allow", allow)]);
        (web, pod)
    }

    /// `shop.test` with one address, and pods of the namespace `shop` that may reach it.
    #[track_caller]
    pub fn pods_of_shop<const N: usize>(&self, names: [&str; N]) -> [Pod; N] {
        self.dns().addresses("shop.test", &[server(10)]);
        names.map(|name| {
            let pod = self.pod("shop", name);
            self.write_pod(&pod, &[("allow", "shop.test:443")]);
            pod
        })
    }

    /// The pods `shop/cart` and `shop/mail` on one bridge of the node, `br0`. They have no manifest yet.
    #[track_caller]
    pub fn two_pods_on_a_bridge(&self) -> [Pod; 2] {
        let pods = ON_BRIDGE.map(|name| self.pod("shop", name));
        let mut lines = "link add br0 address 02:00:00:00:77:01 type bridge mcast_snooping 0\n\
                         link set br0 up\n"
            .to_owned();
        for pod in &pods {
            lines.extend(["link set ", pod.interface(), " master br0\n"]);
        }
        self.node().ip_batch(&lines);
        pods
    }
}
