// Serves CustomResourceDefinitions and their objects as a Kubernetes API server does: with the server of
// k8s.io/apiextensions-apiserver, over etcd, on a port of 127.0.0.1.
//
// It has no other kinds, no admission plugins and no authorization. Whoever has the token may do anything.
// `-version` prints the release of Kubernetes whose code it is, and ends.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"

	"k8s.io/apiextensions-apiserver/pkg/apiserver"
	"k8s.io/apiextensions-apiserver/pkg/cmd/server/options"
	generatedopenapi "k8s.io/apiextensions-apiserver/pkg/generated/openapi"
	"k8s.io/apiserver/pkg/authentication/authenticator"
	"k8s.io/apiserver/pkg/authentication/request/bearertoken"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/authorization/authorizerfactory"
	openapinamer "k8s.io/apiserver/pkg/endpoints/openapi"
	genericapiserver "k8s.io/apiserver/pkg/server"
	"k8s.io/apiserver/pkg/util/compatibility"
	"k8s.io/apiserver/pkg/util/openapi"
	"k8s.io/apiserver/pkg/util/webhook"
	"k8s.io/client-go/kubernetes/scheme"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run() error {
	etcd := flag.String("etcd", "", "URL of etcd")
	directory := flag.String("directory", "", "directory for the certificate, and for the file `port`")
	token := flag.String("token", "", "the bearer token of requests")
	version := flag.Bool("version", false, "print the version and end")
	flag.Parse()
	if *version {
		fmt.Printf("Kubernetes v%s\n", compatibility.DefaultBuildEffectiveVersion().BinaryVersion())
		return nil
	}
	if *etcd == "" || *directory == "" || *token == "" {
		return errors.New("usage: server -etcd URL -directory DIRECTORY -token TOKEN")
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	config, err := configuration(*etcd, *directory, *token, listener)
	if err != nil {
		return err
	}
	server, err := config.Complete().New(genericapiserver.NewEmptyDelegate())
	if err != nil {
		return err
	}
	port := strconv.Itoa(listener.Addr().(*net.TCPAddr).Port)
	if err := os.WriteFile(filepath.Join(*directory, "port"), []byte(port), 0o600); err != nil {
		return err
	}
	return server.GenericAPIServer.PrepareRun().RunWithContext(context.Background())
}

func configuration(etcd, directory, token string, listener net.Listener) (*apiserver.Config, error) {
	wanted := options.NewCustomResourceDefinitionsServerOptions(os.Stdout, os.Stderr)
	recommended := wanted.RecommendedOptions
	recommended.Etcd.StorageConfig.Transport.ServerList = []string{etcd}
	recommended.SecureServing.Listener = listener
	recommended.SecureServing.ServerCert.CertDirectory = directory
	// The rest of a cluster, which is not there.
	recommended.Authentication = nil
	recommended.Authorization = nil
	recommended.CoreAPI = nil
	recommended.Admission = nil
	recommended.Features.EnablePriorityAndFairness = false
	if err := wanted.ServerRunOptions.ComponentGlobalsRegistry.Set(); err != nil {
		return nil, err
	}
	if err := recommended.SecureServing.MaybeDefaultWithSelfSignedCerts("localhost", nil,
		[]net.IP{net.IPv4(127, 0, 0, 1)}); err != nil {
		return nil, err
	}

	generic := genericapiserver.NewRecommendedConfig(apiserver.Codecs)
	if err := wanted.ServerRunOptions.ApplyTo(&generic.Config); err != nil {
		return nil, err
	}
	if err := recommended.ApplyTo(generic); err != nil {
		return nil, err
	}
	if err := wanted.APIEnablement.ApplyTo(&generic.Config, apiserver.DefaultAPIResourceConfigSource(),
		apiserver.Scheme); err != nil {
		return nil, err
	}
	generic.Authentication.Authenticator = bearertoken.New(holderOf(token))
	generic.Authorization.Authorizer = authorizerfactory.NewAlwaysAllowAuthorizer()
	definitions := openapi.GetOpenAPIDefinitionsWithoutDisabledFeatures(generatedopenapi.GetOpenAPIDefinitions)
	namer := openapinamer.NewDefinitionNamer(apiserver.Scheme, scheme.Scheme)
	generic.OpenAPIConfig = genericapiserver.DefaultOpenAPIConfig(definitions, namer)
	generic.OpenAPIV3Config = genericapiserver.DefaultOpenAPIV3Config(definitions, namer)
	return &apiserver.Config{
		GenericConfig: generic,
		ExtraConfig: apiserver.ExtraConfig{
			CRDRESTOptionsGetter: options.NewCRDRESTOptionsGetter(*recommended.Etcd, generic.ResourceTransformers,
				generic.StorageObjectCountTracker),
			ServiceResolver:     noServices{},
			AuthResolverWrapper: func(resolver webhook.AuthenticationInfoResolver) webhook.AuthenticationInfoResolver { return resolver },
		},
	}, nil
}

// Authenticates requests that have this token, as an administrator.
func holderOf(token string) authenticator.Token {
	return authenticator.TokenFunc(func(_ context.Context, given string) (*authenticator.Response, bool, error) {
		administrator := user.DefaultInfo{Name: "admin", Groups: []string{user.SystemPrivilegedGroup}}
		return &authenticator.Response{User: &administrator}, given == token, nil
	})
}

// Finds no Service: no definition has a webhook for conversion.
type noServices struct{}

func (noServices) ResolveEndpoint(namespace, name string, _ int32) (*url.URL, error) {
	return nil, fmt.Errorf("no Service %s/%s: %s", namespace, name, http.StatusText(http.StatusNotFound))
}
