# shellcheck shell=bash
# The checks of tests/e2e/run that are about policy objects: one pod has their label and no annotation.

readonly LABEL=egress-agent-e2e=selected
# Of every object.
readonly OBJECT=egress-agent-e2e
readonly NETWORK_POLICIES=clusternetworkpolicies.policy.networking.k8s.io

# What this run has made, and has to remove.
made_objects=false
made_network_policy=false
made_network_policy_api=false

# --- what is asked ---

# edit KIND SPEC: merges the specification in JSON into the object's.
edit() {
    k patch "$1" "$OBJECT" --namespace "$NAMESPACE" --type merge --patch "{\"spec\":$2}" >/dev/null ||
        stop "cannot edit the $1"
}

# allow [ENTRY…]: the team's policy allows what policies.yaml says, and this.
allow() {
    local entries
    entries=$(printf ',"%s"' "@$OBJECT:80/tcp" "$DENIED:80" "$ADDRESS:443/tcp" "$@")
    edit egresspolicy "{\"allow\":[${entries#,}]}"
}

# decided KIND NAMESPACE TEXT…: whether a denial line of the pod names the object of that kind.
decided() {
    local kind=$1 namespace=$2
    shift 2
    line selected "\"policy\":{\"kind\":\"$kind\",\"namespace\":$namespace,\"name\":\"$OBJECT\"" "$@"
}

node_of_selected() { k get pod --namespace "$NAMESPACE" selected --output 'jsonpath={.spec.nodeName}'; }

# in_force KIND: whether the report of the pod's node says that the object of that kind is in force there as it was
# edited last.
in_force() {
    local generation reported
    generation=$(k get "$1" "$OBJECT" --namespace "$NAMESPACE" --output 'jsonpath={.metadata.generation}')
    reported=$(k get egressnodereport "$(node_of_selected)" --output 'jsonpath={range .status.policies[*]}{.kind}/{.name}: of generation {.generation} {.appliedGeneration}, in {.enforced} of {.selected} pods{"\n"}{end}' |
        grep --ignore-case "^$1/$OBJECT: ")
    case $reported in
    *": of generation $generation $generation, in 1 of 1 pods") echo 'in force' ;;
    *) echo "${reported:-not reported} (generation $generation)" ;;
    esac
}

# columns KIND: the first line that `kubectl get` prints.
columns() { k get "$1" --all-namespaces 2>/dev/null | sed -n '1s/  */ /gp'; }

# row: the numbers that `kubectl get egressnodereports` prints for the pod's node, if they say what they should.
row() {
    local policies applied pods enforced numbers
    numbers=$(k get egressnodereports --no-headers 2>/dev/null |
        awk -v node="$(node_of_selected)" '$1 == node { print $2, $3, $4, $5 }')
    read -r policies applied pods enforced <<<"$numbers"
    if [ "${policies:-0}" -ge 2 ] && [ "$applied" = "$policies" ] && [ "${pods:-0}" -ge 1 ] && [ "$enforced" = "$pods" ]; then
        echo 'everything applied'
    else
        echo "${numbers:-no line}"
    fi
}

# listed: how many of the three objects `kubectl get egress` prints, each under its own columns.
listed() {
    k get egress --all-namespaces --show-kind 2>/dev/null | awk -v name="$OBJECT" '
        $1 == "NAMESPACE" || $1 == "NAME" { columns = $0; gsub(/ +/, " ", columns); sub(/ $/, "", columns) }
        / egresspolicy\.egress-agent\.dev\// && $2 ~ "/" name "$" && columns == "NAMESPACE NAME MODE AGE" { found++ }
        /clusteregresspolicy\.egress-agent\.dev\// && $0 ~ "/" name " +Admin +900 " && columns ~ "NAME TIER PRIORITY AGE$" { found++ }
        /egressset\.egress-agent\.dev\// && $0 ~ "/" name " " && columns ~ "NAME AGE$" { found++ }
        END { print found + 0 " of 3" }'
}

# has_expressions: whether the API server keeps the expressions of definitions (Kubernetes 1.25), and so evaluates them.
has_expressions() {
    k get customresourcedefinition egresspolicies.egress-agent.dev --output 'jsonpath={.spec.versions}' |
        grep -q x-kubernetes-validations
}

# problem_reported TEXT: whether the report of the pod's node has a problem with the text.
problem_reported() {
    if k get egressnodereport "$(node_of_selected)" \
        --output 'jsonpath={range .status.problems[*]}{.about}: {.message}{"\n"}{end}' | grep -qF "$1"; then
        echo reported
    else
        echo missing
    fi
}

# --- the checks ---

make_objects() {
    made_objects=true
    pods_manifest "$here/policies.yaml" | apply --filename - >&2 || stop 'cannot apply the policy objects'
}

check_objects() {
    soon 'objects: a pod that none selects is left alone' reached reach "$NAMESPACE" selected "$OTHER_ADDRESS" 443
    make_objects
    soon 'EgressPolicy: what no entry allows is not reached' 'not reached' \
        reach "$NAMESPACE" selected "$OTHER_ADDRESS" 443
    soon 'status: the selected pod is enforced' enforced status selected
    soon 'EgressPolicy: a destination of an EgressSet is reached' reached reach "$NAMESPACE" selected "$ALLOWED" 80
    check 'EgressPolicy: but not on another port' 'not reached' \
        reach "$NAMESPACE" selected "$ALLOWED" "$OTHER_PORT"
    soon 'EgressPolicy: an address that it allows is reached' reached reach "$NAMESPACE" selected "$ADDRESS" 443
    check 'EgressPolicy: pods without the label are left alone' reached \
        reach "$NAMESPACE" plain "$OTHER_ADDRESS" 443
    soon 'ClusterEgressPolicy: a name that it denies cannot be asked for' NXDOMAIN ask selected "$DENIED" a
    check 'ClusterEgressPolicy: nor reached, though the team allows it' 'not reached' \
        reach "$NAMESPACE" selected "$DENIED" 80

    soon 'a denial line names the EgressPolicy that closes the pod' written \
        decided EgressPolicy "\"$NAMESPACE\"" "\"dst_ip\":\"$OTHER_ADDRESS\"" '"dst_port":443'
    soon 'a denial line names the ClusterEgressPolicy and its rule' written \
        decided ClusterEgressPolicy null '"rule":"sinkhole"' "\"dns_name\":\"$DENIED\""
    check 'explain: what a set allows' ALLOWED explain selected "$ALLOWED:80"
    check 'explain: what the ClusterEgressPolicy denies' DENIED explain selected "$DENIED:80"

    soon 'kubectl get egress prints the objects with their columns' '3 of 3' listed
    check 'kubectl get egressnodereports prints its columns' \
        'NAME POLICIES APPLIED PODS ENFORCED PROBLEMS AGE' columns egressnodereports
    soon 'and that everything is applied on the node of the pod' 'everything applied' row
    soon 'report: the EgressPolicy is in force' 'in force' in_force EgressPolicy
    soon 'report: the ClusterEgressPolicy is in force' 'in force' in_force ClusterEgressPolicy

    check_object_edits
    check_unreadable_object
    check_network_policy
}

# Each edit is taken back.
check_object_edits() {
    allow "$OTHER_ADDRESS:443/tcp"
    soon 'EgressPolicy: an entry that is added works in the running pod' reached \
        reach "$NAMESPACE" selected "$OTHER_ADDRESS" 443
    soon 'report: the edit is in force' 'in force' in_force EgressPolicy
    allow
    soon 'EgressPolicy: an entry that is removed is cut' 'not reached' \
        reach "$NAMESPACE" selected "$OTHER_ADDRESS" 443
    edit egressset "{\"destinations\":[\"$WILDCARD\"]}"
    soon 'EgressSet: a destination that is removed is cut' 'not reached' reach "$NAMESPACE" selected "$ALLOWED" 80
    edit egressset "{\"destinations\":[\"$WILDCARD\",\"$ALLOWED\"]}"
    soon 'EgressSet: a destination that is added is reached' reached reach "$NAMESPACE" selected "$ALLOWED" 80

    edit egresspolicy '{"mode":"off"}'
    soon 'EgressPolicy: with mode: off its lists do not count' reached \
        reach "$NAMESPACE" selected "$OTHER_ADDRESS" 443
    check 'ClusterEgressPolicy: what it denies stays denied' 'not reached' reach "$NAMESPACE" selected "$DENIED" 80
    edit egresspolicy '{"mode":null}'
    soon 'EgressPolicy: without the mode they count again' 'not reached' \
        reach "$NAMESPACE" selected "$OTHER_ADDRESS" 443

    k label pod --namespace "$NAMESPACE" selected "${LABEL%%=*}-" >/dev/null || stop 'cannot remove the label'
    soon 'a pod that loses the label is released' reached reach "$NAMESPACE" selected "$DENIED" 80
    k label pod --namespace "$NAMESPACE" selected "$LABEL" >/dev/null || stop 'cannot set the label'
    soon 'and closed when it has it again' 'not reached' reach "$NAMESPACE" selected "$OTHER_ADDRESS" 443
}

check_unreadable_object() {
    local said
    said=$(k patch egresspolicy "$OBJECT" --namespace "$NAMESPACE" --type merge \
        --patch "{\"spec\":{\"allow\":[\"$ALLOWED:80\",\"https://$ALLOWED\"]}}" 2>&1)
    if has_expressions; then
        case $said in
        *'spec.allow[1]'*'cannot be read'*) result 'the API server refuses an entry that cannot be read' passed ;;
        *) result 'the API server refuses an entry that cannot be read' FAILED "$said" ;;
        esac
    else
        soon 'report: an entry that cannot be read (not refused before 1.25)' reported \
            problem_reported "EgressPolicy $NAMESPACE/$OBJECT, spec.allow[1]"
        check 'the last readable lists stay: what they allow is reached' reached \
            reach "$NAMESPACE" selected "$ADDRESS" 443
        check 'the last readable lists stay: nothing else is reached' 'not reached' \
            reach "$NAMESPACE" selected "$OTHER_ADDRESS" 443
        allow
        soon 'report: the corrected policy is in force' 'in force' in_force EgressPolicy
    fi
}

check_network_policy() {
    if ! k get customresourcedefinition "$NETWORK_POLICIES" >/dev/null 2>&1; then
        $network_policy_api || return 0
        made_network_policy_api=true
        apply --filename "$here/network-policy-api.yaml" >&2 || stop 'cannot define ClusterNetworkPolicy'
        k wait --for=condition=Established "customresourcedefinition/$NETWORK_POLICIES" --timeout=1m >&2
    fi
    made_network_policy=true
    pods_manifest "$here/network-policy.yaml" | apply --filename - >&2 || stop 'cannot apply the ClusterNetworkPolicy'
    soon 'ClusterNetworkPolicy: what it accepts is reached' reached reach "$NAMESPACE" selected "$OTHER_ADDRESS" 443
    soon 'ClusterNetworkPolicy: what it denies is not' 'not reached' reach "$NAMESPACE" selected "$ADDRESS" 443
    soon 'a denial line names the ClusterNetworkPolicy and its rule' written \
        decided ClusterNetworkPolicy null '"rule":"closed"' "\"dst_ip\":\"$ADDRESS\""
    soon 'report: the ClusterNetworkPolicy is in force' 'in force' in_force ClusterNetworkPolicy
    remove_network_policy
    soon 'without it the team'\''s address is reached again' reached reach "$NAMESPACE" selected "$ADDRESS" 443
    check 'and what only it accepted is not' 'not reached' reach "$NAMESPACE" selected "$OTHER_ADDRESS" 443
    remove_network_policy_api
}

# Behind a restart of the agents.
check_objects_after_restart() {
    soon 'objects: the selected pod is enforced after it' enforced status selected
    soon 'objects: what they allow is reached after it' reached reach "$NAMESPACE" selected "$ALLOWED" 80
    check 'objects: what they deny is not' 'not reached' reach "$NAMESPACE" selected "$DENIED" 80
    check 'objects: nor what they do not allow' 'not reached' reach "$NAMESPACE" selected "$OTHER_ADDRESS" 443
    soon 'report: the EgressPolicy is in force after it' 'in force' in_force EgressPolicy
}

check_objects_removed() {
    k delete egresspolicy "$OBJECT" --namespace "$NAMESPACE" >&2 || stop 'cannot delete the EgressPolicy'
    soon 'without the EgressPolicy what it closed is reached' reached \
        reach "$NAMESPACE" selected "$OTHER_ADDRESS" 443
    check 'and what the ClusterEgressPolicy denies is not' 'not reached' reach "$NAMESPACE" selected "$DENIED" 80
    remove_objects
    soon 'without any object the pod is released' reached reach "$NAMESPACE" selected "$DENIED" 80
    soon 'report: it does not list them any more' 'not reported (generation )' in_force ClusterEgressPolicy
}

# --- taking down ---

remove_network_policy() {
    if $made_network_policy; then
        made_network_policy=false
        k delete clusternetworkpolicy "$OBJECT" --ignore-not-found >&2
    fi
}

# When the agents know that the objects are gone: a policy that goes with its definition stays in force.
remove_network_policy_api() {
    if $made_network_policy_api; then
        made_network_policy_api=false
        k delete --ignore-not-found --filename "$here/network-policy-api.yaml" >&2
    fi
}

# That of the namespace goes with the namespace, too.
remove_objects() {
    remove_network_policy
    remove_network_policy_api
    $made_objects || return 0
    made_objects=false
    k delete --ignore-not-found --filename "$here/policies.yaml" >&2
}
