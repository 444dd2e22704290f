#!/bin/sh
# aws-account.sh BUCKET [ADDRESS]: what cluster.yaml wants of an AWS account, once, and my-cluster.yaml, which
# is cluster.yaml with its gaps filled. Needs the aws command, logged in. ADDRESS may reach port 22: yours.
set -eu
cd "$(dirname "$0")/.."
bucket=${1:?usage: clusters/aws-account.sh BUCKET [ADDRESS]}
address=${2:-$(curl -fsS https://checkip.amazonaws.com)}
AWS_DEFAULT_REGION=$(sed -n 's/^  region: //p' cluster.yaml)
export AWS_DEFAULT_REGION
account=$(aws sts get-caller-identity --query Account --output text)
registry=$account.dkr.ecr.$AWS_DEFAULT_REGION.amazonaws.com

once() { "$@" >/dev/null || echo "(this goes on: it may be there already)" >&2; }

once aws s3api create-bucket --bucket "$bucket" $(
    [ "$AWS_DEFAULT_REGION" = us-east-1 ] ||
        echo "--create-bucket-configuration LocationConstraint=$AWS_DEFAULT_REGION"
)
once aws ecr create-repository --repository-name diffitm
once aws iam create-service-linked-role --aws-service-name spot.amazonaws.com

trust='{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "sts:AssumeRole",
  "Principal": {"Service": "ec2.amazonaws.com"}}]}'
store='{"Version": "2012-10-17", "Statement": [
  {"Effect": "Allow", "Action": ["s3:ListBucket", "s3:GetBucketLocation"], "Resource": "arn:aws:s3:::'$bucket'"},
  {"Effect": "Allow", "Action": ["s3:GetObject", "s3:PutObject", "s3:DeleteObject",
    "s3:AbortMultipartUpload"], "Resource": "arn:aws:s3:::'$bucket'/*"}]}'
# What the head's autoscaler does: it starts nodes, and ends those of this cluster alone.
nodes='{"Version": "2012-10-17", "Statement": [
  {"Effect": "Allow", "Action": ["ec2:Describe*", "ec2:RunInstances", "ec2:CreateTags"], "Resource": "*"},
  {"Effect": "Allow", "Action": "ec2:TerminateInstances", "Resource": "*",
    "Condition": {"StringEquals": {"ec2:ResourceTag/ray-cluster-name": "diffitm"}}},
  {"Effect": "Allow", "Action": "ssm:GetParameters",
    "Resource": "arn:aws:ssm:*::parameter/aws/service/deeplearning/*"},
  {"Effect": "Allow", "Action": "iam:PassRole", "Resource": "arn:aws:iam::'$account':role/diffitm-worker"}]}'
for role in diffitm-head diffitm-worker; do
    once aws iam create-role --role-name $role --assume-role-policy-document "$trust"
    aws iam put-role-policy --role-name $role --policy-name store --policy-document "$store"
    aws iam attach-role-policy --role-name $role \
        --policy-arn arn:aws:iam::aws:policy/AmazonEC2ContainerRegistryPullOnly
    once aws iam create-instance-profile --instance-profile-name $role
    once aws iam add-role-to-instance-profile --instance-profile-name $role --role-name $role
done
aws iam put-role-policy --role-name diffitm-head --policy-name nodes --policy-document "$nodes"

# Port 22 for the address alone, all others for the cluster itself alone.
once aws ec2 create-security-group --group-name diffitm --description diffitm
group=$(aws ec2 describe-security-groups --filters Name=group-name,Values=diffitm \
    --query 'SecurityGroups[0].GroupId' --output text)
once aws ec2 authorize-security-group-ingress --group-id "$group" --protocol -1 --source-group "$group"
once aws ec2 authorize-security-group-ingress --group-id "$group" --protocol tcp --port 22 --cidr "$address/32"

sed "s|FILL-IN-REGISTRY|$registry|g; s|sg-FILL-IN|$group|g" cluster.yaml >my-cluster.yaml
echo "REGISTRY=$registry BUCKET=$bucket"
