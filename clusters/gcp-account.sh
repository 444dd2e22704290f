#!/bin/sh
# gcp-account.sh PROJECT BUCKET [ADDRESS]: what clusters/gcp.yaml wants of a Google Cloud project, once, and
# my-cluster.yaml, which is that file with its gaps filled. Needs gcloud, logged in. ADDRESS may reach port 22:
# yours.
set -eu
cd "$(dirname "$0")/.."
project=${1:?usage: clusters/gcp-account.sh PROJECT BUCKET [ADDRESS]}
bucket=${2:?usage: clusters/gcp-account.sh PROJECT BUCKET [ADDRESS]}
address=${3:-$(curl -fsS https://checkip.amazonaws.com)}
region=$(sed -n 's/^  region: //p' clusters/gcp.yaml)
registry=$region-docker.pkg.dev/$project/diffitm
export CLOUDSDK_CORE_PROJECT="$project"

once() { "$@" || echo "(this goes on: it may be there already)" >&2; }

gcloud services enable compute.googleapis.com iam.googleapis.com cloudresourcemanager.googleapis.com \
    artifactregistry.googleapis.com
once gcloud storage buckets create "gs://$bucket" --location "$region"
once gcloud artifacts repositories create diffitm --repository-format docker --location "$region"

# Port 22 for the address alone, all others for the cluster itself alone.
once gcloud compute networks create diffitm --subnet-mode custom
once gcloud compute networks subnets create diffitm --network diffitm --region "$region" --range 10.0.0.0/20
once gcloud compute firewall-rules create diffitm-inside --network diffitm --allow all \
    --source-tags diffitm --target-tags diffitm
once gcloud compute firewall-rules create diffitm-ssh --network diffitm --allow tcp:22 \
    --source-ranges "$address/32" --target-tags diffitm

# The second is the launcher's own, for the head: it gives it the project's compute and storage rights, and
# would make it, but then without the images.
for account in diffitm-worker ray-autoscaler-sa-v1; do
    once gcloud iam service-accounts create $account
    member=serviceAccount:$account@$project.iam.gserviceaccount.com
    gcloud artifacts repositories add-iam-policy-binding diffitm --location "$region" \
        --role roles/artifactregistry.reader --member "$member"
    gcloud storage buckets add-iam-policy-binding "gs://$bucket" --role roles/storage.objectUser \
        --member "$member"
done

sed "s|FILL-IN-REGISTRY|$registry|g; s|FILL-IN-PROJECT|$project|g" clusters/gcp.yaml >my-cluster.yaml
echo "REGISTRY=$registry BUCKET=$bucket"
