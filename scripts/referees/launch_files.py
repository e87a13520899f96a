"""Holds launch/*.yaml against schemas of the fields they use, and has SkyPilot parse its own.

Schemas name every field that our files use and no other, so that a slip of the pen is one that fails. They were written from the
API references of JobSet v1alpha2 (jobset.sigs.k8s.io), Kubernetes 1.34 (batch/v1, core/v1) and Kueue (the queue's label); SkyPilot's
fields are checked by the package itself.

    python3 -m venv .venv-launch && .venv-launch/bin/pip install pyyaml==6.0.4 jsonschema==4.26.0 skypilot==0.14.1
    .venv-launch/bin/python scripts/referees/launch_files.py
"""

import pathlib
import sys

import jsonschema
import yaml

LAUNCH = pathlib.Path(__file__).resolve().parents[2] / "launch"


def table(required, optional=None):
    """An object with these fields and no others."""
    fields = {**required, **(optional or {})}
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


def array(items):
    return {"type": "array", "items": items, "minItems": 1}


TEXT = {"type": "string", "minLength": 1}
COUNT = {"type": "integer", "minimum": 0}
NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"}
QUANTITIES = {
    "type": "object",
    "properties": {key: {"type": "string", "pattern": "^[0-9]+(Gi|Mi|m)?$"} for key in ("cpu", "memory", "nvidia.com/gpu")},
    "additionalProperties": False,
}
CONTAINER = table(
    {"name": NAME, "image": TEXT},
    {
        "command": array(TEXT),
        "args": array(TEXT),
        "env": array(table({"name": TEXT, "value": {"type": "string"}})),
        "ports": array(table({"containerPort": {"type": "integer", "minimum": 1, "maximum": 65535}})),
        "resources": table({}, {"requests": QUANTITIES, "limits": QUANTITIES}),
        "volumeMounts": array(table({"name": NAME, "mountPath": {"type": "string", "pattern": "^/"}})),
    },
)
POD = table(
    {"restartPolicy": {"enum": ["Never", "OnFailure"]}, "containers": array(CONTAINER)},
    {
        "terminationGracePeriodSeconds": COUNT,
        "volumes": array(table({"name": NAME, "persistentVolumeClaim": table({"claimName": TEXT})})),
    },
)
JOB = {
    "completionMode": {"enum": ["Indexed"]},
    "completions": COUNT,
    "parallelism": COUNT,
    "backoffLimit": COUNT,
    "template": table({"spec": POD}),
}
METADATA = table({"name": NAME, "labels": table({"kueue.x-k8s.io/queue-name": TEXT})})
JOBSET = table(
    {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": METADATA,
        "spec": table(
            {
                "failurePolicy": table({"maxRestarts": COUNT}),
                "network": table({"enableDNSHostnames": {"const": True}, "publishNotReadyAddresses": {"const": True}}),
                "replicatedJobs": array(
                    table({"name": NAME, "replicas": COUNT, "template": table({"spec": table(JOB)})})
                ),
            }
        ),
    }
)
INDEXED_JOB = table(
    {
        "apiVersion": {"const": "batch/v1"},
        "kind": {"const": "Job"},
        "metadata": METADATA,
        "spec": table({**JOB, "suspend": {"const": True}}),
    }
)


def volumes_are_there(spec):
    """Every mount names a volume of its pod."""
    for job in spec.get("replicatedJobs", [{"template": {"spec": spec}}]):
        pod = job["template"]["spec"]["template"]["spec"]
        volumes = {volume["name"] for volume in pod.get("volumes", [])}
        for container in pod["containers"]:
            for mount in container.get("volumeMounts", []):
                assert mount["name"] in volumes, f"no volume {mount['name']}"


def main():
    for path in sorted((LAUNCH / "kubernetes").glob("*.yaml")):
        [document] = yaml.safe_load_all(path.read_text())
        schema = {"JobSet": JOBSET, "Job": INDEXED_JOB}[document["kind"]]
        jsonschema.Draft202012Validator(schema).validate(document)
        volumes_are_there(document["spec"])
        print(f"{path.name}: {document['apiVersion']} {document['kind']}")
    # A field that does not exist must fail, or the schemas check nothing.
    document["spec"]["paralellism"] = 4
    try:
        jsonschema.Draft202012Validator(INDEXED_JOB if document["kind"] == "Job" else JOBSET).validate(document)
    except jsonschema.ValidationError:
        pass
    else:
        sys.exit("a field that does not exist was let through")

    import sky

    for path in sorted((LAUNCH / "skypilot").glob("*.yaml")):
        task = sky.Task.from_yaml(str(path))
        print(f"{path.name}: skypilot {sky.__version__}, task {task.name}, {task.num_nodes} nodes")


if __name__ == "__main__":
    main()
