//go:build tools

// Package operators pins what the schemas of the operators' resources are made of: the Go types in which each
// operator defines its resources, and the generator that the operators themselves make their CRDs with.
package operators

import (
	_ "github.com/external-secrets/external-secrets/apis/externalsecrets/v1"
	_ "github.com/kedacore/keda/v2/apis/keda/v1alpha1"
	_ "github.com/prometheus-operator/prometheus-operator/pkg/apis/monitoring/v1"
	_ "sigs.k8s.io/controller-tools/cmd/controller-gen"
)
