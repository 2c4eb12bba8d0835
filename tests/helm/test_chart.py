"""The chart renders what a cluster takes and the service starts with, and refuses what it does not know."""

from __future__ import annotations

import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from consumer import __version__, config
from consumer.runtime import intake, membership, reporter, webhooks
from consumer.storage import kafka_transactions
from tests.helm import schema
from tests.helm.conftest import Helm, RenderError
from tests.helm.schema import CHART

EXAMPLES = sorted((CHART / "ci").glob("*.yaml"))
SQLITE, ALL, SCRAM, MTLS, CONFLUENT, MSK, MSK_IAM = (
    CHART / "ci" / f"{name}.yaml"
    for name in ("sqlite", "sqlite-all", "scram", "mtls", "confluent-cloud", "msk", "msk-iam")
)

each_example = pytest.mark.parametrize("values", EXAMPLES, ids=lambda path: path.stem)


def read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return found


# What is rendered


def test_the_schema_of_the_values_is_the_services_own() -> None:
    """Whatever the service learns to read, the chart lets through, and nothing else."""
    written = (CHART / "values.schema.json").read_text(encoding="utf-8")
    assert written == schema.text(), "it is stale: python -m tests.helm.schema"


def test_the_schema_of_the_values_knows_each_value_and_no_other() -> None:
    """What the chart takes has a default that says so, and a comment."""

    def keys(found: dict[str, Any], known: dict[str, Any], place: str = "") -> Iterator[str]:
        inside = known.get("properties", {})
        yield from (place + each for each in inside.keys() ^ found.keys() if known.get("additionalProperties") is False)
        for each in inside.keys() & found.keys() - {"config"}:
            if isinstance(found[each], dict):
                yield from keys(found[each], inside[each], f"{place}{each}.")

    known = json.loads((CHART / "chart.schema.json").read_text(encoding="utf-8"))
    # config is the service's own, and helm puts global there where the chart is a part of another one.
    assert set(keys(read(CHART / "values.yaml"), known)) == {"config", "global"}


def test_the_chart_deploys_this_version() -> None:
    """The tag of the image is the version of the source, unless the values say otherwise."""
    assert read(CHART / "Chart.yaml")["appVersion"] == __version__


@each_example
def test_an_example_is_rendered_and_valid(helm: Helm, validated: Callable[[Helm, Path], str], values: Path) -> None:
    """helm lints it without a word; Kubernetes and the operators know every key of every manifest."""
    helm.lint(values)
    assert validated(helm, values) == ""


def test_what_no_api_knows_is_not_valid(helm: Helm, validated: Callable[[Helm, Path], str], tmp_path: Path) -> None:
    """The validation above would have noticed: in Kubernetes' own resources, and in each operator's."""
    chart = tmp_path / "chart"
    shutil.copytree(CHART, chart)
    for name, right, wrong in (
        ("workload", "terminationGracePeriodSeconds:", "terminationGracePeriod:"),
        ("monitoring", "podMetricsEndpoints:", "podMetricEndpoints:"),
        ("autoscaling", "minReplicaCount:", "minReplicas:"),
        ("externalsecret", "secretStoreRef:", "storeRef:"),
    ):
        template = chart / "templates" / f"{name}.yaml"
        template.write_text(template.read_text(encoding="utf-8").replace(right, wrong), encoding="utf-8")
    said = validated(Helm(helm.program, chart), SCRAM) + validated(Helm(helm.program, chart), CONFLUENT)
    for kind in ("Deployment t-tallyman-deliver", "PodMonitor", "ScaledObject", "ExternalSecret"):
        assert re.search(f"- {kind}.* is invalid", said), said


@each_example
def test_the_service_reads_what_the_values_say(helm: Helm, values: Path, tmp_path: Path) -> None:
    """Nothing changes its meaning on the way through helm: no number, no text that looks like one, no time."""
    objects = helm.objects(values)
    for name in objects.pods:
        volumes = {each["name"]: each for each in objects.pods[name]["volumes"]}
        mounted = objects.of("ConfigMap")[volumes["config"]["configMap"]["name"]]["data"]
        (tmp_path / "rendered.yaml").write_text(mounted["tallyman.yaml"], encoding="utf-8")
        (tmp_path / "stated.yaml").write_text(_text_of(values, "config"), encoding="utf-8")
        rendered, stated = (config.load(tmp_path / f"{each}.yaml", {}) for each in ("rendered", "stated"))
        assert rendered == stated


def _text_of(values: Path, key: str) -> str:
    """What stands under a key, as it stands there."""
    inside = re.search(rf"^{key}:\n((?:  .*\n|\n)+)", values.read_text(encoding="utf-8"), re.MULTILINE)
    assert inside is not None
    return re.sub("^  ", "", inside[1], flags=re.MULTILINE)


@each_example
def test_a_pod_may_do_little(helm: Helm, values: Path) -> None:
    """No root, no token, no file system to write to but for what is mounted; commands of the chart included."""
    objects = helm.objects(values)
    jobs = [each["spec"]["template"]["spec"] for each in objects.of("Job").values()]
    for pod in (*objects.pods.values(), *jobs, objects.one("Pod")["spec"]):
        (container,) = pod["containers"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


@each_example
def test_a_pod_has_time_for_its_last_commit(helm: Helm, values: Path) -> None:
    """Also when Kafka does not answer: killed in it, the process would be replaced only when its session is over."""
    longest = (
        reporter.LAST_ANSWERS_S
        + kafka_transactions.COMMIT_S
        + kafka_transactions.ABORT_S
        + intake.CLOSE_S
        + membership.CLOSE_S
    )
    for pod in helm.objects(values).pods.values():
        assert pod["terminationGracePeriodSeconds"] >= longest


@each_example
def test_probes_ask_for_progress_and_for_readiness(helm: Helm, values: Path) -> None:
    """On the port that the configuration states."""
    port = read(values)["config"].get("http", {}).get("port", 9464)
    for pod in helm.objects(values).pods.values():
        (container,) = pod["containers"]
        assert container["ports"][0] == {"name": "http", "containerPort": port}
        assert container["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": "http"}
        assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "http"}


# One process, or two stages


def test_the_file_has_one_process_that_is_never_doubled(helm: Helm) -> None:
    """A StatefulSet with its volume: no second pod before the first is known to be gone, and nothing scales."""
    objects = helm.objects(SQLITE)
    service = objects.one("StatefulSet")["spec"]
    assert service["replicas"] == 1
    assert service["persistentVolumeClaimRetentionPolicy"] == {"whenDeleted": "Retain", "whenScaled": "Retain"}
    assert [each["metadata"]["name"] for each in service["volumeClaimTemplates"]] == ["state"]
    (container,) = service["template"]["spec"]["containers"]
    assert container["args"] == ["run"]
    assert {"name": "state", "mountPath": "/tallyman/var"} in container["volumeMounts"]
    assert not {"Deployment", "PodDisruptionBudget"} & {each["kind"] for each in objects.all}


def test_kafka_has_a_deployment_for_each_stage(helm: Helm) -> None:
    """Each with its budget and its own number of processes, and no volume."""
    objects = helm.objects(SCRAM)
    stages = objects.of("Deployment")
    assert {name: pod["containers"][0]["args"] for name, pod in objects.pods.items()} == {
        f"t-tallyman-{stage}": ["run", "--stage", stage] for stage in ("aggregate", "deliver")
    }
    assert stages["t-tallyman-deliver"]["spec"]["replicas"] == 3
    assert "replicas" not in stages["t-tallyman-aggregate"]["spec"], "KEDA says how many"
    assert set(objects.of("PodDisruptionBudget")) == set(stages)
    assert not {"StatefulSet", "PersistentVolumeClaim"} & {each["kind"] for each in objects.all}


def test_counting_gets_no_key_of_stripes(helm: Helm) -> None:
    """Each process has the secrets that it needs, as files, from the Secrets that the values name."""
    pods = helm.objects(SCRAM).pods
    assert _secrets(pods["t-tallyman-aggregate"]) == {
        "KAFKA_SASL_USERNAME": ("tallyman", "kafka-user"),
        "KAFKA_SASL_PASSWORD": ("tallyman-kafka-user", "password"),
    }
    assert _secrets(pods["t-tallyman-deliver"]) == {
        **_secrets(pods["t-tallyman-aggregate"]),
        "STRIPE_SECRET_KEY": ("tallyman", "STRIPE_SECRET_KEY"),
        "STRIPE_WEBHOOK_SECRET": ("tallyman", "webhook"),
    }


def _secrets(pod: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """By variable, where its file comes from."""
    (container,) = pod["containers"]
    folder = next(each["mountPath"] for each in container["volumeMounts"] if each["name"] == "secrets")
    sources = next(each["projected"]["sources"] for each in pod["volumes"] if each["name"] == "secrets")
    files = {
        f"{folder}/{item['path']}": (source["secret"]["name"], item["key"])
        for source in sources
        for item in source["secret"]["items"]
    }
    named = {each["name"]: each["value"] for each in container["env"] if each["name"].endswith("_FILE")}
    assert set(named.values()) == set(files)
    return {name.removesuffix("_FILE"): files[file] for name, file in named.items()}


@each_example
def test_no_secret_is_made_of_values(helm: Helm, values: Path) -> None:
    """The operator for external secrets may make one; the chart makes none."""
    assert not helm.objects(values).of("Secret")


def test_a_secret_from_a_store_is_the_one_that_is_mounted(helm: Helm) -> None:
    """Under its keys."""
    objects = helm.objects(CONFLUENT)
    made = objects.one("ExternalSecret")["spec"]
    keys = {each["secretKey"] for each in made["data"]}
    for pod in objects.pods.values():
        assert all(at[0] == made["target"]["name"] and at[1] in keys for at in _secrets(pod).values())


# Scaling


def test_keda_scales_by_the_lag_of_the_group_and_not_beyond_the_partitions(helm: Helm) -> None:
    """It asks Kafka as the service does, of the group that the service commits for."""
    objects = helm.objects(MSK)
    scaled = objects.one("ScaledObject")["spec"]
    assert (scaled["scaleTargetRef"]["name"], scaled["minReplicaCount"]) == ("t-tallyman-aggregate", 3)
    (trigger,) = scaled["triggers"]
    stated = read(MSK)["config"]
    assert trigger["metadata"] == {
        "bootstrapServers": stated["kafka"]["bootstrap_servers"],
        "topic": "usage-events",
        "consumerGroup": f"tallyman-{stated['pipeline']}-aggregate",
        "lagThreshold": "50000",
        "allowIdleConsumers": "false",
        "scaleToZeroOnInvalidOffset": "false",
        "sasl": "scram_sha512",
        "tls": "enable",
    }
    authentication = objects.of("TriggerAuthentication")[trigger["authenticationRef"]["name"]]["spec"]
    assert authentication["secretTargetRef"] == [
        {"parameter": "password", "name": "msk", "key": "password"},
        {"parameter": "username", "name": "msk", "key": "username"},
    ]


def test_with_iam_all_that_asks_kafka_has_the_role(helm: Helm) -> None:
    """Commands of the chart included, and KEDA: in its own words, with a role of its own."""
    objects = helm.objects(MSK_IAM)
    account = objects.one("ServiceAccount")
    assert account["metadata"]["annotations"] == read(MSK_IAM)["serviceAccount"]["annotations"]
    jobs = [each["spec"]["template"]["spec"] for each in objects.of("Job").values()]
    assert jobs
    for pod in (*objects.pods.values(), *jobs):
        assert pod["serviceAccountName"] == account["metadata"]["name"]
    (trigger,) = objects.one("ScaledObject")["spec"]["triggers"]
    assert trigger["authenticationRef"] == {"name": "msk"}
    told = {key: trigger["metadata"][key] for key in ("sasl", "saslTokenProvider", "awsRegion", "tls")}
    assert told == {
        "sasl": "oauthbearer",
        "saslTokenProvider": "aws_msk_iam",
        "awsRegion": "eu-central-1",
        "tls": "enable",
    }


def test_keda_is_not_left_without_what_it_needs(helm: Helm) -> None:
    """A render that fails is better than a scaler that cannot log in, and leaves everything as it is."""
    with pytest.raises(RenderError, match=r"it takes OAUTHBEARER, PLAIN, SCRAM-SHA-256, SCRAM-SHA-512"):
        helm.render(MSK, "config.kafka.options.sasl\\.mechanism=GSSAPI")
    with pytest.raises(RenderError, match=r"it has to be told of ssl\.ca\.location, too"):
        helm.render(SCRAM, "aggregate.autoscaling.authentication=")
    with pytest.raises(RenderError, match=r"it has to be told of sasl\.oauthbearer\.client\.id, too"):
        helm.render(CONFLUENT, "aggregate.autoscaling.authentication=")
    with pytest.raises(RenderError, match=r"it needs a role, too: set aggregate\.autoscaling\.authentication"):
        helm.render(MSK_IAM, "aggregate.autoscaling.authentication=")
    with pytest.raises(RenderError, match=r"set config\.kafka\.token\.region"):
        helm.render(MSK_IAM, "config.kafka.token.region=null")


def test_cpu_scales_each_stage(helm: Helm) -> None:
    """Between what the values state."""
    scaled = helm.objects(MTLS).of("HorizontalPodAutoscaler")
    bounds = {name: (each["spec"]["minReplicas"], each["spec"]["maxReplicas"]) for name, each in scaled.items()}
    assert bounds == {"t-tallyman-aggregate": (2, 12), "t-tallyman-deliver": (2, 4)}


# The network


def test_only_what_sends_reaches_stripe(helm: Helm) -> None:
    """All may ask DNS and Kafka, on the ports that the configuration names; counting has no way to Stripe."""
    policies = helm.objects(SCRAM).of("NetworkPolicy")
    ports = {
        name: {port["port"] for rule in each["spec"]["egress"] for port in rule["ports"]}
        for name, each in policies.items()
    }
    assert ports == {
        "t-tallyman-aggregate": {53, 9093},
        "t-tallyman-deliver": {53, 9093, 443},
        "t-tallyman-check": {53, 9093, 443},
        "t-tallyman-reconcile": {53, 9093, 443},
        "t-tallyman-test": {53, 9464},
    }


def test_stripes_notifications_find_what_sends(helm: Helm) -> None:
    """Where the configuration takes them: from the ingress to the processes that deliver, and to no others."""
    objects = helm.objects(SCRAM)
    (rule,) = objects.one("Ingress")["spec"]["rules"]
    (path,) = rule["http"]["paths"]
    assert (rule["host"], path["path"]) == ("usage.example", webhooks.PATH)
    service = objects.of("Service")[path["backend"]["service"]["name"]]["spec"]
    ports = {name: pod["containers"][0]["ports"] for name, pod in objects.pods.items()}
    assert service["selector"]["app.kubernetes.io/component"] == "deliver"
    assert service["ports"][0]["targetPort"] == "webhook"
    assert {"name": "webhook", "containerPort": 9465} in ports["t-tallyman-deliver"]
    assert len(ports["t-tallyman-aggregate"]) == 1
    let_in = {
        name: [port["port"] for rule in each["spec"].get("ingress", ()) for port in rule["ports"]]
        for name, each in objects.of("NetworkPolicy").items()
    }
    assert let_in["t-tallyman-deliver"] == [9464, 9465]
    assert let_in["t-tallyman-aggregate"] == [9464]
    assert not helm.objects(MSK).of("Ingress")


# Upgrades, and the release's own test


@each_example
def test_an_upgrade_checks_the_new_configuration_first(helm: Helm, values: Path) -> None:
    """The hook has a ConfigMap of its own: the release's still holds the old configuration when it runs."""
    objects = helm.objects(values)
    if not read(values).get("check", {}).get("enabled", True):
        assert not objects.of("Job")
        return
    job = objects.one("Job")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["args"] == ["check"]
    volumes = {each["name"]: each for each in job["spec"]["template"]["spec"]["volumes"]}
    checked = objects.of("ConfigMap")[volumes["config"]["configMap"]["name"]]
    for pod in objects.pods.values():
        mounted = next(each["configMap"]["name"] for each in pod["volumes"] if each["name"] == "config")
        assert checked["data"] == objects.of("ConfigMap")[mounted]["data"]
    for hook in (job, checked):
        assert hook["metadata"]["annotations"]["helm.sh/hook"] == "pre-upgrade"
    if objects.of("StatefulSet"):
        assert volumes["state"] == {"name": "state", "persistentVolumeClaim": {"claimName": "state-t-tallyman-0"}}


@each_example
def test_every_day_what_was_delivered_is_compared_with_stripe(helm: Helm, values: Path) -> None:
    """With what the service that delivers has: its configuration, its secrets, its state."""
    objects = helm.objects(values)
    if not read(values).get("reconcile", {}).get("enabled", True):
        assert not objects.of("CronJob")
        return
    pod = objects.one("CronJob")["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    service = objects.pods.get("t-tallyman-deliver") or objects.pods["t-tallyman"]
    container, beside = pod["containers"][0], service["containers"][0]
    assert container["args"][0] == "reconcile"
    assert [container[each] for each in ("env", "volumeMounts")] == [beside[each] for each in ("env", "volumeMounts")]
    claim = {"name": "state", "persistentVolumeClaim": {"claimName": "state-t-tallyman-0"}}
    assert pod["volumes"] == service["volumes"] + [claim] * bool(objects.of("StatefulSet"))


@pytest.mark.parametrize("values", [SQLITE, MSK], ids=lambda path: path.stem)
def test_an_upgrade_cannot_rename_a_pipeline(helm: Helm, values: Path) -> None:
    """A renamed one bills all again. The cluster refuses another selector, and what runs keeps its configuration.

    That is also why what is mounted has another name: whoever restarts after the refusal finds the old one.
    """
    before, after = (helm.objects(values, *settings) for settings in ((), ("config.pipeline=other",)))
    for name, pod in before.pods.items():
        kind = "StatefulSet" if before.of("StatefulSet") else "Deployment"
        was, becomes = (each.of(kind)[name]["spec"]["selector"]["matchLabels"] for each in (before, after))
        assert was != becomes
        mounted = next(each["configMap"]["name"] for each in pod["volumes"] if each["name"] == "config")
        assert mounted in before.of("ConfigMap")
        assert mounted not in after.of("ConfigMap")


@pytest.mark.parametrize("ready", [True, False])
def test_the_releases_test_asks_every_process(helm: Helm, ready: bool) -> None:
    """It passes where all are ready, and else fails and says what they wait for."""

    class Readyz(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path == "/readyz"
            self.send_response(200 if ready else 503)
            self.end_headers()
            self.wfile.write(b"ok\n" if ready else b"Kafka has not answered since 2026-11-20T13:42:25Z\n")

        def log_message(self, *_: object) -> None:
            pass

    objects = helm.objects(SCRAM)
    _, *arguments = objects.one("Pod")["spec"]["containers"][0]["command"]
    assert set(arguments[3:]) == set(objects.of("Deployment"))
    assert set(arguments[3:]) <= set(objects.of("Service"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Readyz) as pod:
        threading.Thread(target=pod.serve_forever, daemon=True).start()
        done = subprocess.run(
            [sys.executable, *arguments[:2], str(pod.server_port), "127.0.0.1"],
            capture_output=True,
            text=True,
            check=False,
            env={name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")},
        )
        pod.shutdown()
    assert (done.returncode == 0) is ready
    assert ("ok" if ready else "Kafka has not answered") in done.stdout


# Rules and dashboards


def test_rules_and_dashboards_go_as_they_are_written(helm: Helm, tmp_path: Path) -> None:
    """Their braces belong to Prometheus and Grafana, not to helm."""
    chart = tmp_path / "chart"
    shutil.copytree(CHART, chart, ignore=shutil.ignore_patterns("alerts", "dashboards"))
    for folder in ("alerts", "dashboards"):
        (chart / folder).mkdir()
    groups = [
        {"name": name, "rules": [{"alert": name, "expr": "up == 0", "annotations": {"summary": "{{ $labels.pod }}"}}]}
        for name in ("one", "two")
    ]
    for group in groups:
        (chart / "alerts" / f"{group['name']}.yaml").write_text(yaml.safe_dump({"groups": [group]}), encoding="utf-8")
    dashboard = '{"title": "{{pod}} and ${datasource}",\n "panels": []}\n'
    (chart / "dashboards" / "operator.json").write_text(dashboard, encoding="utf-8")
    objects = Helm(helm.program, chart).objects(SCRAM)
    assert objects.one("PrometheusRule")["spec"]["groups"] == groups
    made = objects.of("ConfigMap")["t-tallyman-operator"]
    assert made["data"] == {"operator.json": dashboard}
    assert made["metadata"]["labels"]["grafana_dashboard"] == "1"


def test_the_alerts_link_to_where_the_runbook_is_served(helm: Helm) -> None:
    def links(values: Path) -> set[str]:
        groups = helm.objects(values).one("PrometheusRule")["spec"]["groups"]
        rules = [rule for group in groups for rule in group["rules"] if "alert" in rule]
        return {rule["annotations"]["runbook_url"].partition("#")[0] for rule in rules}

    assert links(SCRAM) == {"docs/runbook.md"}
    assert links(ALL) == {"https://wiki.example.com/tallyman"}


# What is refused


@pytest.mark.parametrize("values", [ALL, SCRAM], ids=lambda path: path.stem)
def test_a_misspelt_value_fails_the_render(helm: Helm, values: Path, tmp_path: Path) -> None:
    """In every section of the chart's values and of the service's configuration: helm names each of them."""
    # Through JSON: what an anchor repeats is one object else.
    given = json.loads(json.dumps(_merged(read(CHART / "values.yaml"), read(values)), default=str))
    misspelt = tmp_path / "misspelt.yaml"
    names = list(_misspell(given, ()))
    misspelt.write_text(yaml.safe_dump(given), encoding="utf-8")
    with pytest.raises(RenderError) as refused:
        helm.render(misspelt)
    said = str(refused.value)
    assert [name for name in names if f"'{name}'" not in said] == []
    assert len(names) >= 50


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = {**base, **over}
    for key in base.keys() & over.keys():
        if isinstance(base[key], dict) and isinstance(over[key], dict):
            both[key] = _merged(base[key], over[key])
    return both


FREE = {"where", "options", "requests", "limits", "labels", "annotations", "podLabels", "podAnnotations", "affinity"}
FREE |= {"nodeSelector", "podSecurityContext", "secrets", "data"}
"""Whose keys are the user's own, or Kubernetes', or a list of variables."""


def _misspell(given: Any, place: tuple[str, ...]) -> Iterator[str]:
    """Put a key beside each one that looks like it, and yield those names."""
    if place and place[-1] in FREE and place != ("config", "limits"):
        return
    if isinstance(given, list) and place == ("config", "meters"):
        for each in given:
            yield from _misspell(each, (*place, "[]"))
    if isinstance(given, dict):
        for key, inner in list(given.items()):
            yield from _misspell(inner, (*place, key))
            wrong = f"{key}{len(place)}s"
            given[wrong] = inner
            yield wrong


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("config.stripe.livemode=maybe", "/config/stripe/livemode"),
        ("config.windows.lateness=2minutes", "/config/windows/lateness"),
        (
            "config.storage.kind=sqlite,config.storage.path=/data/tallyman.db",
            "config.storage.path: the volume is mounted at /tallyman/var",
        ),
        ("config.http.port=0", "config.http.port and config.webhook.port: 0 takes a free port"),
        ("config.webhook.port=9465", "config.webhook: Stripe is known by STRIPE_WEBHOOK_SECRET: name it in secrets"),
        ("config.kafka.options.sasl\\.password=hunter2", "sasl.password"),
        ("secrets.STRIPE_KEY.key=stripe", "STRIPE_KEY"),
        ("existingSecret=", "secrets.STRIPE_SECRET_KEY: set existingSecret, or name the Secret"),
        ("config.customers.kind=file,config.customers.path=x.yaml", "config.customers.path"),
        (
            "config.customers.kind=file,config.customers.path=customers/customers.yaml",
            "set customers.existingConfigMap",
        ),
        ("check.enabled=false,persistence.accessMode=ReadWriteOncePod", "and reconcile.enabled: they read the state"),
        ("reconcile.enabled=false,persistence.accessMode=ReadWriteOncePod", "check.enabled and reconcile.enabled"),
        ("terminationGracePeriodSeconds=5", "/terminationGracePeriodSeconds"),
        ("aggregate.autoscaling.kind=cpu", "/aggregate/autoscaling/kind"),
        ("deliver.autoscaling.kind=keda", "/deliver/autoscaling/kind"),
        ("aggregate.autoscaling.min=0", "/aggregate/autoscaling/min"),
        (
            "externalSecret.data.STRIPE_WEBHOOK_SECRET.key=a,externalSecret.enabled=true,externalSecret.store.name=b",
            "externalSecret.data.STRIPE_WEBHOOK_SECRET: name it in secrets, too",
        ),
    ],
    ids=lambda text: text.split("=")[0],
)
def test_what_cannot_work_fails_the_render_and_says_why(helm: Helm, setting: str, said: str) -> None:
    """Before anything is deployed."""
    with pytest.raises(RenderError, match=re.escape(said)):
        helm.render(SQLITE, setting)


def test_a_chart_without_configuration_says_what_is_missing(helm: Helm, tmp_path: Path) -> None:
    """There is no pipeline that everybody means."""
    empty = tmp_path / "values.yaml"
    empty.write_text("{}\n", encoding="utf-8")
    with pytest.raises(RenderError, match=r"'pipeline'.*'stripe'.*'meters'"):
        helm.render(empty)
