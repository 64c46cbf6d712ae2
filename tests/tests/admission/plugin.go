// Judges objects as the API server does: with the Kubernetes plugin that evaluates
// ValidatingAdmissionPolicies. Its argument is the policy's file.
//
// Each line of standard input is a request in JSON, {"object": …, "oldObject": …, "userInfo": …}, of which the last two
// may be missing. `userInfo` has a `username` and perhaps `extra`, as in a TokenReview. Each response is one line:
// {"rejected": why}, {"failed": why} or {}. `failed` is a failure that `failurePolicy: Ignore` would silently
// admit: an expression that does not compile, that fails on its input, or that exceeds the API server's cost
// limit.
package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	admissionregistration "k8s.io/api/admissionregistration/v1"
	core "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/apiserver/pkg/admission/plugin/policy/validating"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/authorization/authorizerfactory"
	dynamic "k8s.io/client-go/dynamic/fake"
	"k8s.io/client-go/informers"
	kubernetes "k8s.io/client-go/kubernetes/fake"
	"k8s.io/client-go/kubernetes/scheme"
)

const namespace = "default"

type request struct {
	Object    json.RawMessage `json:"object"`
	OldObject json.RawMessage `json:"oldObject"`
	UserInfo  *userInfo       `json:"userInfo"`
}

type userInfo struct {
	Username string              `json:"username"`
	Extra    map[string][]string `json:"extra"`
}

type answer struct {
	Rejected string `json:"rejected,omitempty"`
	Failed   string `json:"failed,omitempty"`
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run() error {
	if len(os.Args) != 2 {
		return errors.New("usage: plugin POLICY.yaml < REQUESTS")
	}
	objects, err := policy(os.Args[1])
	if err != nil {
		return err
	}
	plugin, err := start(objects)
	if err != nil {
		return err
	}
	input := bufio.NewReader(os.Stdin)
	output := json.NewEncoder(os.Stdout)
	for {
		line, err := input.ReadBytes('\n')
		if err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
		answer, err := judge(plugin, line)
		if err != nil {
			return fmt.Errorf("%w: %s", err, line)
		}
		if err := output.Encode(answer); err != nil {
			return err
		}
	}
}

// The file's policies, changed so that failures are distinguishable from verdicts, and their bindings.
func policy(path string) ([]runtime.Object, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	objects := []runtime.Object{
		&core.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace}},
	}
	documents := yaml.NewYAMLReader(bufio.NewReader(bytes.NewReader(text)))
	for {
		document, err := documents.Read()
		if err == io.EOF {
			return objects, nil
		} else if err != nil {
			return nil, err
		}
		object, _, err := scheme.Codecs.UniversalDeserializer().Decode(document, nil, nil)
		if err != nil {
			return nil, err
		}
		switch object := object.(type) {
		case *admissionregistration.ValidatingAdmissionPolicy:
			fail := admissionregistration.Fail
			object.Spec.FailurePolicy = &fail
			equivalent := admissionregistration.Equivalent
			object.Spec.MatchConstraints.MatchPolicy = &equivalent
			object.Spec.MatchConstraints.NamespaceSelector = &metav1.LabelSelector{}
			object.Spec.MatchConstraints.ObjectSelector = &metav1.LabelSelector{}
		case *admissionregistration.ValidatingAdmissionPolicyBinding:
		default:
			return nil, fmt.Errorf("%s: unexpected %T", path, object)
		}
		objects = append(objects, object)
	}
}

func start(objects []runtime.Object) (*validating.Plugin, error) {
	plugin, err := validating.NewPlugin(nil)
	if err != nil {
		return nil, err
	}
	client := kubernetes.NewSimpleClientset(objects...)
	factory := informers.NewSharedInformerFactory(client, 0)
	never := make(chan struct{})
	plugin.SetExternalKubeClientSet(client)
	plugin.SetExternalKubeInformerFactory(factory)
	plugin.SetRESTMapper(meta.NewDefaultRESTMapper(nil))
	plugin.SetDynamicClient(dynamic.NewSimpleDynamicClient(scheme.Scheme))
	plugin.SetAuthorizer(authorizerfactory.NewAlwaysDenyAuthorizer())
	plugin.SetDrainedNotification(never)
	if err := plugin.ValidateInitialization(); err != nil {
		return nil, err
	}
	factory.Start(never)
	factory.WaitForCacheSync(never)
	if !plugin.WaitForReady() {
		return nil, errors.New("the plugin does not become ready")
	}
	return plugin, nil
}

// An object as the API server has it: of its own type, or without one if a definition defines its kind.
func decode(text []byte) (runtime.Object, error) {
	object, _, err := scheme.Codecs.UniversalDeserializer().Decode(text, nil, nil)
	if runtime.IsNotRegisteredError(err) {
		object, _, err = unstructured.UnstructuredJSONScheme.Decode(text, nil, nil)
	}
	return object, err
}

func judge(plugin *validating.Plugin, line []byte) (answer, error) {
	var request request
	if err := json.Unmarshal(line, &request); err != nil {
		return answer{}, err
	}
	object, err := decode(request.Object)
	if err != nil {
		return answer{}, err
	}
	operation, options := admission.Create, runtime.Object(&metav1.CreateOptions{})
	var old runtime.Object
	if len(request.OldObject) > 0 && string(request.OldObject) != "null" {
		if old, err = decode(request.OldObject); err != nil {
			return answer{}, err
		}
		operation, options = admission.Update, &metav1.UpdateOptions{}
	}
	kind := object.GetObjectKind().GroupVersionKind()
	resource, _ := meta.UnsafeGuessKindToResource(kind)
	access, err := meta.Accessor(object)
	if err != nil {
		return answer{}, err
	}
	in := namespace
	switch kind.Kind {
	case "Namespace":
		in = access.GetName()
	case "EgressNodeReport":
		in = ""
	}
	requester := &user.DefaultInfo{Name: "somebody"}
	if request.UserInfo != nil {
		requester = &user.DefaultInfo{Name: request.UserInfo.Username, Extra: request.UserInfo.Extra}
	}
	attributes := admission.NewAttributesRecord(object, old, kind, in, access.GetName(), resource, "",
		operation, options, false, requester)
	err = plugin.Validate(context.Background(), attributes, admission.NewObjectInterfacesFromScheme(scheme.Scheme))
	if err == nil {
		return answer{}, nil
	}
	// A rejection is "… denied request: MESSAGE". The texts below mark a failed expression (validator.go,
	// message.go).
	_, message, denied := strings.Cut(err.Error(), " denied request: ")
	for _, sign := range []string{"resulted in error: ", "compilation error: ", "compilation failed: ", "budget"} {
		if strings.Contains(message, sign) {
			return answer{Failed: message}, nil
		}
	}
	if !denied {
		return answer{Failed: err.Error()}, nil
	}
	return answer{Rejected: message}, nil
}
