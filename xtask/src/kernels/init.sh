#!/bin/sh
# The first process of the virtual machine that `cargo xtask kernels` boots: creates a pod, drives an
# agent, prints one line per check and `finished` with their number, and switches the machine off.
#
# From the kernel's command line: EXPECT_ATTACH, tcx or clsact.
set -u
export PATH=/usr/bin:/bin

mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs run /run
mount -t tmpfs tmp /tmp

# The shell prefers busybox's own programs of these names.
ip() { /usr/bin/ip "$@"; }
tc() { /usr/bin/tc "$@"; }

checks=0
failures=0

# check WHAT COMMAND...: the command must succeed.
check() {
    what=$1
    shift
    checks=$((checks + 1))
    if "$@" > /tmp/said 2>&1; then
        echo "ok      $what"
    else
        failures=$((failures + 1))
        echo "FAILED  $what"
        sed 's/^/    /' /tmp/said
    fi
}

not() { ! "$@"; }

# pass MODULE: the system tests of this module pass, and there is at least one.
pass() {
    /tests/packets --test-threads 1 "$1::" > /tmp/tests
    cat /tmp/tests
    grep -q '^test result: ok\. [1-9]' /tmp/tests
}

# within SECONDS COMMAND...: the command must succeed within this time.
within() {
    left=$(($1 * 5))
    shift
    until "$@"; do
        left=$((left - 1))
        [ "$left" -gt 0 ] || return 1
        sleep 0.2
    done
}

pod() { ip netns exec pod "$@"; }
reaches() { pod ping -c 1 -W 2 "$1"; }

# connects ADDRESS PORT: a web server answers.
connects() { printf 'GET / HTTP/1.0\r\n\r\n' | pod nc -w 3 "$1" "$2" | grep hello; }

# resolves NAME RESOLVER ADDRESS: the address is in the response.
resolves() { pod nslookup "$1" "$2" | tee /dev/stderr | grep -qF "Address: $3"; }
is_nonexistent() { pod nslookup "$1" "$2" 2>&1 | tee /dev/stderr | grep -q NXDOMAIN; }

is_reported() { within 5 grep -F "$1" /tmp/denials; }

# A refused connection fails long before its time-out, at which `timeout` would end it.
is_refused() {
    pod timeout 5 nc -w 10 "$1" "$2" < /dev/null
    [ $? -eq 1 ]
}

# start SETTING [LEARN]: runs the agent with this `onDeny` and `dns.learn`, and waits until it is ready.
start() {
    cat > /tmp/config.yaml << CONFIG
onDeny: $1
dns:
  resolvers: ["198.51.100.53", "2001:db8:1::53"]
  learn: ${2:-agent}
CONFIG
    egress-agent run --pods-dir /tmp/pods --config /tmp/config.yaml \
        >> /tmp/denials 2> /tmp/agent.log &
    agent=$!
    within 60 is_ready || {
        cat /tmp/agent.log
        return 1
    }
}

is_ready() { grep -q ' ready ' /tmp/agent.log; }
has_ended() { not kill -0 "$agent"; }

filters() {
    tc filter show dev veth1 ingress
    tc filter show dev veth1 egress
}

pins=/sys/fs/bpf/egress-agent/v2

is_attached() {
    filters
    find $pins/links
    case $EXPECT_ATTACH in
        tcx)
            [ "$(find $pins/links -name '*_from_pod' -o -name '*_to_pod' | wc -l)" -eq 2 ]
            ;;
        clsact)
            [ "$(filters | grep -c -e ' from_pod ' -e ' to_pod ')" -eq 2 ]
            ;;
    esac
}

# Programs disappear with their last reference, which the kernel drops a little later.
has_programs() { bpftool prog show | grep -e ' name from_pod ' -e ' name to_pod '; }
has_no_programs() { within 10 not has_programs; }

allow_map() { bpftool map dump pinned "$pins/pods/shop_cart/allow"; }
is_learned() { allow_map | tee /dev/stderr | grep -q '"expires_ns"'; }

has_tables() { [ "$(nft list tables | tee /dev/stderr | grep -c egress-agent)" -eq "$1" ]; }

# Half of the pod's frames go to an ifb device, and half of the frames that it sends again do not go through it
# a second time: they skip the filters on the node.
send_again() {
    pod ip link add ifb0 type ifb && pod ip link set ifb0 up &&
        pod tc qdisc add dev eth0 clsact &&
        pod tc filter add dev eth0 egress prio 1 \
            bpf bytecode '4,32 0 0 4294963256,69 0 1 1,6 0 0 4294967295,6 0 0 0' \
            action mirred egress redirect dev ifb0
}
send_no_more() { pod tc qdisc del dev eth0 clsact && pod ip link del ifb0; }

# reaches_at_last ADDRESS: one of many attempts gets a reply.
reaches_at_last() {
    for attempt in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16; do
        pod ping -c 1 -W 1 "$1" && return 0
    done
    return 1
}

has_complained() { dmesg | grep -e 'BUG: [^s]' -e 'WARNING: ' -e 'Oops'; }

echo "kernel  $(uname -r)"
for module in /modules/*; do
    [ -e "$module" ] && insmod "$module"
done

hostname node

# The pod, and the destinations beyond the node: addresses on the node's loopback.
ip link set lo up
for last in 1 7 8 9 10 53; do
    ip address add 198.51.100.$last/32 dev lo
    ip address add 2001:db8:1::$last/128 dev lo nodad
done
ip netns add pod
ip link add veth1 type veth peer name eth0 netns pod
ip address add 10.9.0.1/24 dev veth1
ip address add 2001:db8:9::1/64 dev veth1 nodad
ip link set veth1 up
pod ip link set lo up
pod ip address add 10.9.0.2/24 dev eth0
pod ip address add 2001:db8:9::2/64 dev eth0 nodad
pod ip link set eth0 up
pod ip route add default via 10.9.0.1
pod ip route add default via 2001:db8:9::1

echo 'root:x:0:0:root:/:/bin/sh' > /etc/passwd
mkdir /tmp/www /tmp/pods
echo hello > /tmp/www/index.html
httpd -p 80 -h /tmp/www
httpd -p 81 -h /tmp/www
dnsmasq --conf-file=/dev/null --user=root --pid-file --no-resolv --no-hosts --bind-interfaces \
    --listen-address=198.51.100.53,2001:db8:1::53 \
    --host-record=shop.example,198.51.100.7,2001:db8:1::7,60 \
    --host-record=web.example,198.51.100.8,2001:db8:1::8,60 \
    --host-record=late.example,198.51.100.10,2001:db8:1::10,60 \
    --host-record=other.example,198.51.100.9,2001:db8:1::9,60

cat > /tmp/pods/cart.yaml << 'MANIFEST'
apiVersion: v1
kind: Pod
metadata:
  name: cart
  namespace: shop
  annotations:
    egress-agent.dev/interface: veth1
    egress-agent.dev/allow: |
      198.51.100.1/icmp
      2001:db8:1::1/icmp
      shop.example
      web.example:80
      late.example
status:
  podIPs: [{ip: 10.9.0.2}, {ip: "2001:db8:9::2"}]
MANIFEST

check "without an agent, everything is reached over IPv4" reaches 198.51.100.9
check "without an agent, everything is reached over IPv6" reaches 2001:db8:1::9
check "without an agent, every name resolves" resolves other.example 198.51.100.53 198.51.100.9

check "an agent starts" start drop
check "its programs are attached through $EXPECT_ATTACH" is_attached
check "an allowed IPv4 address is reached" reaches 198.51.100.1
check "an allowed IPv6 address is reached" reaches 2001:db8:1::1
check "another IPv4 address is not" not reaches 198.51.100.9
check "another IPv6 address is not" not reaches 2001:db8:1::9
check "the denied IPv4 packet is reported" is_reported '"dst_ip":"198.51.100.9"'
check "the denied IPv6 packet is reported" is_reported '"dst_ip":"2001:db8:1::9"'

check "an allowed name's address is not reached before it is queried" not reaches 198.51.100.7
check "the name resolves" resolves shop.example 198.51.100.53 198.51.100.7
check "its IPv4 address is reached now" reaches 198.51.100.7
check "its IPv6 address is reached now" reaches 2001:db8:1::7
check "a name resolves over IPv6" resolves web.example 2001:db8:1::53 2001:db8:1::8
check "its allowed port is reached over IPv4" connects 198.51.100.8 80
check "its allowed port is reached over IPv6" connects 2001:db8:1::8 80
check "another of its ports is not" not connects 198.51.100.8 81
check "a query for another name is refused" is_nonexistent other.example 198.51.100.53
check "a query for another name is refused over IPv6" is_nonexistent other.example 2001:db8:1::53
check "the denied name is reported" is_reported '"dns_name":"other.example"'
check "bpftool shows what was learned" is_learned

check "there is a table for each family" has_tables 3
check "a device that sends frames again is created" send_again
check "frames that it sends again do not leave" not reaches_at_last 198.51.100.9
check "these frames are reported" is_reported '"reason":"not_judged"'
check "the device is removed" send_no_more

kill -9 "$agent"
check "a killed agent is gone" within 10 has_ended
check "without it, a learned address is still reached" reaches 198.51.100.7
check "without it, a denied address is still denied" not reaches 198.51.100.9

check "a second agent takes over" start reject
check "its programs are attached through $EXPECT_ATTACH, once" is_attached
check "a learned address is still reached" reaches 198.51.100.7
check "a denied address is still denied" not reaches 198.51.100.9
check "a denied connection is refused over IPv4" is_refused 198.51.100.9 80
check "a denied connection is refused over IPv6" is_refused 2001:db8:1::9 80
check "a name resolves" resolves late.example 198.51.100.53 198.51.100.10
check "its address is reached" reaches 198.51.100.10

kill -9 "$agent"
check "the second agent is gone" within 10 has_ended
check "an agent starts whose programs learn" start drop kernel
check "a name resolves that was not decided" resolves shop.example 198.51.100.53 198.51.100.7
kill -9 "$agent"
check "the third agent is gone" within 10 has_ended
check "without it, the decided name resolves" resolves shop.example 198.51.100.53 198.51.100.7
check "its address is reached" reaches 198.51.100.7
check "another name does not resolve" not resolves late.example 198.51.100.53 198.51.100.10
check "an agent takes over what the programs have learned" start drop kernel
check "its address is still reached" reaches 198.51.100.7

kill "$agent"
check "the agent ends when it is stopped" within 30 has_ended
check "nothing is denied any more" reaches 198.51.100.9
check "no port is denied any more" connects 198.51.100.8 81
check "its programs are gone" has_no_programs
check "its tables are gone" has_tables 0
check "its pins are gone" not ls "${pins%/*}"

# System tests, each with a laboratory of its own.
mount -t cgroup2 none /sys/fs/cgroup
export EGRESS_AGENT=/usr/bin/egress-agent
for module in late_checksums packet_lists; do
    check "the tests of packets/$module pass" pass "$module"
done

check "the kernel has logged no warning" not has_complained

if [ "$failures" -gt 0 ]; then
    for log in /tmp/agent.log /tmp/denials; do
        echo "--- $log"
        tail -n 40 "$log"
    done
fi
echo "finished $checks"
poweroff -f
